"""Tiny valid checkpoints, and safetensors files built byte by byte, so that each lie can be told on purpose."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "swiglu_limit": 7.0,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}


def config(**changes: Any) -> dict[str, Any]:
    """A gpt-oss config of the smallest sizes; `changes` replace top-level keys."""
    return {**json.loads(json.dumps(CONFIG)), **changes}


def gpt_oss_state(
    cfg: dict[str, Any] | None = None, packed_linears: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Random tensors by name, in the published layout; `packed_linears` are names of modules to pack, too."""
    cfg = cfg or CONFIG
    h, i, e = cfg["hidden_size"], cfg["intermediate_size"], cfg["num_local_experts"]
    q, kv = (cfg[key] * cfg["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    state: dict[str, Tensor] = {}

    def number(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape).to(torch.bfloat16)

    def pack(name: str, *shape: int) -> None:
        grid = (*shape[:-1], shape[-1] // 32)
        state[f"{name}_blocks"] = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(118, 125, grid, dtype=torch.uint8)

    def linear(module: str, n: int, k: int) -> None:
        (pack if module in packed_linears else number)(f"{module}.weight", n, k)

    number("model.embed_tokens.weight", cfg["vocab_size"], h)
    for layer in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        number(f"{p}.input_layernorm.weight", h)
        for name, n, k in (("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, q)):
            linear(f"{p}.self_attn.{name}", n, k)
            number(f"{p}.self_attn.{name}.bias", n)
        number(f"{p}.self_attn.sinks", cfg["num_attention_heads"])
        number(f"{p}.post_attention_layernorm.weight", h)
        linear(f"{p}.mlp.router", e, h)
        number(f"{p}.mlp.router.bias", e)
        for name, n, k in (("gate_up_proj", 2 * i, h), ("down_proj", h, i)):
            pack(f"{p}.mlp.experts.{name}", e, n, k)
            number(f"{p}.mlp.experts.{name}_bias", e, n)
    number("model.norm.weight", h)
    if not cfg.get("tie_word_embeddings"):
        linear("lm_head", cfg["vocab_size"], h)
    return state


def header_of(state: dict[str, tuple[str, list[int], bytes]]) -> dict[str, Any]:
    """The JSON of a safetensors header for (dtype, shape, bytes) by name, in this order."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, data) in state.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    return header


def file_bytes(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file, with `length` in place of the header's true one."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def write_file(
    path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> Path:
    """`file_bytes`, written."""
    path.write_bytes(file_bytes(header, data, length))
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """One header entry, right or wrong."""
    as_list = [list(v) if isinstance(v, tuple) else v for v in (shape, offsets)]
    return {"dtype": dtype, "shape": as_list[0], "data_offsets": as_list[1]}


def raw_bytes(t: Tensor) -> bytes:
    """A tensor's bytes, in C order."""
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def peak_rss_kib() -> int:
    """The process's largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
