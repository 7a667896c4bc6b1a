"""A `StepCache` on the CPU: nobody has captured its addresses, so it grows, and no mask hides slots from a reader."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microscale.integrations.hf.step_cache import StepCache, StepLayer


class TokenLayer(StepLayer):
    """Keys and values of one layer; slots that no token has come to hold anything."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, as the first keys show how much; pages come when they are written."""
        with torch.inference_mode(False):
            self.keys, self.values = (
                t.new_empty(*t.shape[:2], self.slots, t.shape[3]) for t in (key_states, value_states)
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store a prompt and return it; of heads that are not those of before, in new memory."""
        if self.is_initialized:
            for kept, new in ((self.keys, key_states), (self.values, value_states)):
                if (*kept.shape[:2], kept.shape[3]) != (*new.shape[:2], new.shape[3]):
                    self.is_initialized = False
        return super().update(key_states, value_states)

    def reset(self) -> None:
        """What is there will be written before it is read."""

    def widen(self, slots: int) -> None:
        """Have so many slots, which are more, in new memory. No token has been overwritten yet."""
        if not self.is_initialized:
            self.slots = slots
            return
        with torch.inference_mode(False):
            wide = [t.new_empty(*t.shape[:2], slots, t.shape[3]) for t in (self.keys, self.values)]
        for new, old in zip(wide, (self.keys, self.values), strict=True):
            new[:, :, : self.slots] = old
        (self.keys, self.values), self.slots = wide, slots


class TokenCache(StepCache):
    """The cache of a batch whose sequences have one length, for steps that read as many slots as there are tokens."""

    layer = TokenLayer

    def grow(self) -> None:
        """Double the capacity."""
        capacity, (window, _) = 2 * self.capacity, self._made_for
        for layer in self.steps:
            slots = min(window, capacity) if window and layer.is_sliding else capacity
            if slots > layer.slots:
                layer.widen(slots)  # type: ignore[attr-defined]
        with torch.inference_mode(False):
            self._places = torch.arange(capacity, device=self.position.device)
        self._turns = None
        self.capacity = capacity  # last: what fails for want of memory leaves it as it was

    def reset(self) -> None:
        """Forget everything, and a rotary embedding that may have been replaced."""
        super().reset()
        self._turns = None

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether what it has room for is of this dtype, as far as it knows."""
        return all(layer.dtype is dtype for layer in self.steps if layer.is_initialized)

    def begin_step(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """Not for a model's modules, which would want masks."""
        raise NotImplementedError("steps over a TokenCache are chains of the core's")
