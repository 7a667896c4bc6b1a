"""Tiny gpt-oss checkpoints, built here: no test of the command line needs the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast
from typer.testing import Result

from microscale import quantize
from microscale.checkpoints import write

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 2, 4, 64, 32


def make_config() -> GptOssConfig:
    return GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        num_hidden_layers=LAYERS,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        vocab_size=260,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
    )


def make_checkpoint(path: Path, *, nan_scale: bool = False) -> Path:
    config = make_config()
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name, value in GptOssForCausalLM(config).to(torch.bfloat16).state_dict().items():
        value = torch.randn(value.shape, generator=generator).to(torch.bfloat16) * 0.2
        if name == "lm_head.weight":
            value[256:] = 0  # never the likeliest: generations are as long as asked for
        if name.endswith(("gate_up_proj", "down_proj")):
            q = quantize(value.transpose(1, 2), "mxfp4")
            state[f"{name}_blocks"] = q.codes.view(*q.scales.shape, 16)
            state[f"{name}_scales"] = q.scales
        else:
            state[name] = value
    if nan_scale:
        state["model.layers.1.mlp.experts.down_proj_scales"][0, 0, 0] = 255
    settings = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    write(path, settings, state)
    return path


def add_tokenizer(path: Path, template: str | None = None) -> Path:
    """A tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(path)
    return path


def document(result: Result) -> Any:
    """The one JSON document on stdout."""
    decoder = json.JSONDecoder()
    value, end = decoder.raw_decode(result.stdout)
    assert not result.stdout[end:].strip(), "more than one document on stdout"
    return value
