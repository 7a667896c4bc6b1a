"""What a sequence adds to a model's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KvCache:
    """Bytes that the key/value cache grows by for each token of a sequence.

    Attributes:
        per_token: while the sequence is shorter than `window`.
        beyond: behind it, where layers with sliding attention have stopped growing.
        window: tokens; 0: no layer slides, so `beyond` is `per_token`.
    """

    per_token: int = 0
    beyond: int = 0
    window: int = 0


def kv_cache(config: Any) -> KvCache:
    """What transformers' cache stores: keys and values of every attention head that has its own, 16 bits each."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    # Layers whose heads differ (Gemma 4) have configs of their own, and the model's says nothing of these.
    own = getattr(config, "per_layer_config", None)
    layers = [config] * len(kinds) if own is None else list(own)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0
    sliding = full = 0
    for kind, layer in zip(kinds, layers, strict=False):  # of a cut model, kinds may be those of all layers
        if kind in ("sliding_attention", "chunked_attention"):
            sliding += _layer(layer)
        elif "attention" in kind and kind != "linear_attention":
            full += _layer(layer)
    if not sliding or not window:
        return KvCache(full + sliding, full + sliding)
    return KvCache(full + sliding, full, window)


def _layer(config: Any) -> int:
    """Bytes of a token's keys and values in one layer."""
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(config.num_attention_heads, 1)
    keys = getattr(config, "qk_head_dim", None) or head_dim
    values = getattr(config, "v_head_dim", None) or head_dim
    return int(heads * (keys + values) * (config.dtype.itemsize if config.dtype is not None else 2))
