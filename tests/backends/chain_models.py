"""Small models of the architectures that a chain of kernels knows, with random weights."""

from __future__ import annotations

from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_QWEN = {"moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
# Class of the model, and what its config has besides.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("GptOss", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8}),
    "llama": ("Llama", {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "tied_llama": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": ("Qwen3Moe", _QWEN | {"norm_topk_prob": True}),
    "qwen3_moe_of_all": ("Qwen3Moe", _QWEN | {"norm_topk_prob": False, "mlp_only_layers": [1]}),
}


def made(name: str, device: str) -> Any:
    """A model in float32, every parameter of which matters."""
    import transformers

    word, more = MODELS[name]
    config = getattr(transformers, f"{word}Config")(**SIZES | more)
    model = getattr(transformers, f"{word}ForCausalLM")(config).float().eval().to(device)
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.normal_(1.0 if path.endswith("norm.weight") else 0.0, 0.3)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    return model
