"""Small models whose weights are not quantised, and what requantising does to them, the plain way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from microscale import dequantize, quantize
from microscale.integrations.hf.experts import dense_weights

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
DENSE = {
    "llama": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "nemotron_h": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "hybrid_override_pattern": "*E",
    },
}


def dense(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    config = AutoConfig.for_model(kind, **SIZES | DENSE[kind] | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape).to(dtype) * 0.05)
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits.double()


def round_weights(model: nn.Module, fmt: str, names: Sequence[str]) -> None:
    """What requantising does, the plain way: dense weights that were quantised and read back."""
    modules = dict(model.named_modules())
    for name in names:
        module = modules[name]
        dense_ones = dense_weights(module) or {"weight": module.weight.detach()}
        for w in dense_ones.values():
            w.copy_(dequantize(quantize(w.contiguous(), fmt)))


def some_tokens() -> Tensor:
    return torch.randint(2, 96, (1, 12))  # few: each is a chance that rounding decides between two experts
