"""A key/value cache that stays where it is, so that a captured step finds it: transformers' cache of one more kind.

A prompt goes through it as through a `DynamicCache`: attention gets the prompt's own keys, not a cache padded to its
end. A step writes one token into a slot that the device knows, and attention gets all slots with a mask.

transformers' own static cache decides on the host, by the length so far, what a sliding layer does, and moves all of
its keys for each token once the window is full. Here a window is a ring: token t lies in slot t % window. Keys carry
their positions, and a softmax does not ask for an order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

KINDS = ("full_attention", "sliding_attention")


def layer_kinds(config: Any) -> list[str]:
    """What each layer of a text config attends to, in transformers' words.

    As its caches read it: `layer_types`, else all layers slide, are chunked, or are full.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"] * config.num_hidden_layers
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"] * config.num_hidden_layers
    return ["full_attention"] * config.num_hidden_layers


def sights(config: Any) -> tuple[int | None, list[str]]:
    """What the layers of a text config look at: the window of those that slide, and the kind of each."""
    return getattr(config, "sliding_window", None), layer_kinds(config)


def moves(rotary: Any) -> bool:
    """Whether a rotary embedding looks at how long a sequence has become, so that `StepCache.turns` is not its."""
    return any(word in rotary.rope_type for word in ("dynamic", "longrope"))


class StepLayer(CacheLayerMixin):
    """Keys and values of one layer: [B, key heads, slots, D], at one address for as long as it lives."""

    is_compileable = False  # else `generate` compiles the model, and makes masks of its own
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, cache: StepCache, slots: int, sliding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache, self.slots, self.is_sliding = cache, slots, sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, as the first keys show how much."""
        with torch.inference_mode(False):  # steps write to it within that mode and without
            # Zeros, because a masked slot is multiplied by zero, and that is NaN where it holds one.
            self.keys, self.values = (
                t.new_zeros(*t.shape[:2], self.slots, t.shape[3]) for t in (key_states, value_states)
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store a prompt and return it, or one token at the cache's position and return all slots."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.cache.length:
            slot = self.cache.slot(self.slots)
            self.keys.index_copy_(2, slot, key_states)
            self.values.index_copy_(2, slot, value_states)
            return self.keys, self.values
        length = key_states.shape[2]
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            if length <= self.slots:
                kept[:, :, :length] = new
            else:  # the last window; of its tokens the first lies in slot length % slots
                kept.copy_(new[:, :, -self.slots :].roll(length % self.slots, dims=2))
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset of the first) that attention gets."""
        return (self.slots if self.cache.length else query_length), 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.cache.length

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.slots

    def reset(self) -> None:
        """Forget everything, in place."""
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()


class StepCache(Cache):
    """The cache of a batch whose sequences have one length.

    Attributes:
        capacity: tokens that fit.
        length: tokens so far, as the host counts them; 0: the prompt comes next.
        position: of the token that a step takes, int64 [1] on the device.
        steps: the layers.
    """

    layer = StepLayer

    def __init__(self, config: Any, capacity: int, device: torch.device) -> None:
        self.capacity, self.length = capacity, 0
        window = min(getattr(config, "sliding_window", None) or capacity, capacity)
        kinds = layer_kinds(config)
        self._made_for = sights(config)
        self.widths = {k: window if k == "sliding_attention" else capacity for k in dict.fromkeys(kinds)}
        self.steps = [self.layer(self, self.widths[k], k == "sliding_attention") for k in kinds]
        super().__init__(layers=list(self.steps))
        with torch.inference_mode(False):
            self.position = torch.zeros(1, dtype=torch.int64, device=device)
            self._places = torch.arange(capacity, device=device)
        self._slots: dict[int, Tensor] = {}
        self._turns: tuple[Tensor, Tensor] | None = None
        self._arrived: Tensor | None = None

    def suits(self, config: Any) -> bool:
        """Whether its layers look at what those of a text config do: a config may have changed."""
        return self._made_for == sights(config)

    def start(self, length: int) -> None:
        """The prompt is in; steps follow."""
        self.length = length
        self.position.fill_(length)

    def reset(self) -> None:
        """Forget everything, in place: the next tokens are a prompt."""
        super().reset()  # type: ignore[no-untyped-call]
        self.length = 0

    def slot(self, slots: int) -> Tensor:
        """Where a ring of so many slots takes the step's token, int64 [1]."""
        return self._slots[slots]

    def turns(self, rotary: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """A rotary embedding's cosines and sines of every position, [capacity, turned / 2] each; x as it is given.

        Most embeddings give each of them twice, for both halves of what they turn; gpt-oss' gives them once.
        """
        if self._turns is None:
            cos, sin = rotary(x, self._places[None])
            once = type(rotary).__name__ == "GptOssRotaryEmbedding"
            half = cos.shape[2] if once else cos.shape[2] // 2
            cos, sin = (t[0, :, :half].contiguous() for t in (cos, sin))
            self._turns = cos, sin
        return self._turns

    @property
    def arrived(self) -> Tensor:
        """Int32 zeros, one for each key head of each sequence: attention counts programs in them, and clears them."""
        if self._arrived is None:
            with torch.inference_mode(False):
                rows = max(math.prod(layer.keys.shape[:2]) for layer in self.steps)
                self._arrived = torch.zeros(rows, dtype=torch.int32, device=self.position.device)
        return self._arrived

    def begin_step(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Find the step's slots, and its mask over each kind of layer: [1, 1, 1, slots].

        Args:
            dtype: the mask is added to logits of it; None: it is bool, True for what is looked at.
        """
        self._slots = {width: self.position % width for width in set(self.widths.values())}
        seen = self._places <= self.position  # of a ring that has gone round: all
        masks = {kind: seen[:width].view(1, 1, 1, width) for kind, width in self.widths.items()}
        if dtype is None:
            return masks
        low = torch.finfo(dtype).min
        return {k: torch.zeros_like(m, dtype=dtype).masked_fill_(~m, low) for k, m in masks.items()}
