"""A gpt-oss checkpoint in the original layout, written without microscale: transformers' classes make the 16-bit
part, every byte of the packed experts is random, and transformers' own arithmetic says what the bytes mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors


def config(**changes: Any) -> GptOssConfig:
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 3,
        "vocab_size": 160,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 8,
        "max_position_embeddings": 256,
    } | changes
    layers = ["sliding_attention", "full_attention"] * sizes["num_hidden_layers"]
    return GptOssConfig(
        **sizes,
        layer_types=layers[: sizes["num_hidden_layers"]],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )


def write(directory: Path, **changes: Any) -> GptOssForCausalLM:
    """Write the checkpoint; give the same model with dequantised experts, in float32."""
    cfg = config(**changes)
    model = GptOssForCausalLM(cfg).float().eval()
    state: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, 0.15).copy_(p.bfloat16())
            if "norm" in name:
                p.add_(1).copy_(p.bfloat16())
        for name, p in model.named_parameters():
            if not name.endswith(("gate_up_proj", "down_proj")):
                state[name] = p.detach().bfloat16()
                continue
            e, k, n = p.shape
            blocks = torch.randint(0, 256, (e, n, k // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 125, (e, n, k // 32), dtype=torch.uint8)
            p.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            state[f"{name}_blocks"], state[f"{name}_scales"] = blocks, scales
    if cfg.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    text = cfg.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        },
    }
    text["quantization_config"]["modules_to_not_convert"].append("model.embed_tokens")
    (directory / "config.json").write_text(json.dumps(text))
    return model
