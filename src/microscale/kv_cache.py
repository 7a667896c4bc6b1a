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
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(config.num_attention_heads, 1)
    keys = getattr(config, "qk_head_dim", None) or head_dim
    values = getattr(config, "v_head_dim", None) or head_dim
    layer = heads * (keys + values) * (config.dtype.itemsize if config.dtype is not None else 2)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    sliding = sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
    full = sum("attention" in kind and kind != "linear_attention" for kind in kinds) - sliding
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or 0
    if not sliding or not window:
        return KvCache((full + sliding) * layer, (full + sliding) * layer)
    return KvCache((full + sliding) * layer, full * layer, window)
