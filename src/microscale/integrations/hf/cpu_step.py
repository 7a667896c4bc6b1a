"""A step of generation on the CPU: `step.Step`, but for a chain of the core's in place of a CUDA graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from microscale.dense import ROWS
from microscale.integrations.hf.cpu_cache import TokenCache
from microscale.integrations.hf.cpu_parts import Parts, parts_of

ROOM = 1024  # new tokens that a cache has room for at the start


class CpuStep:
    """One token for each sequence of a batch: [B, 1] ids to logits, over a `TokenCache`, which grows as needed.

    A chain is made at a generation's first step, so it never reads weights that are gone.

    Attributes:
        why, why_modules, captured, fused, greedy: as `Step` has them.
    """

    why: None = None
    why_modules: None = None
    captured = fused = True
    greedy = False

    def __init__(self, parts: Parts | str, cache: TokenCache, batch: int) -> None:
        """
        Args:
            parts: what `parts_for` returned.

        Raises:
            ValueError: that was a reason against it.
        """
        if not isinstance(parts, Parts):
            raise ValueError(parts)
        self.cache, self.batch = cache, batch
        self._parts: Parts | None = parts
        self._chain: Any = None

    def __call__(self, ids: Tensor) -> Any:
        """The logits for the next token of each sequence; the next call overwrites them."""
        cache = self.cache
        if cache.length >= cache.capacity:
            cache.grow()
            self._chain = None
        if self._chain is None:
            from microscale.integrations.hf.cpu_chain import TokenChain

            assert self._parts is not None, "it is finished"
            self._chain = TokenChain(self._parts, cache, self.batch)
        self._chain.ids.copy_(ids)
        self._chain.run(cache.length)
        cache.length += 1
        return CausalLMOutputWithPast(logits=self._chain.logits, past_key_values=cache)

    def finish(self) -> None:
        """No step follows: weights that somebody may replace are not held."""
        self._chain = self._parts = None


def parts_for(model: Any, batch: int) -> Parts | str:
    """A model's parts, or why tokens of so many sequences are not one chain of kernels on the CPU, in a sentence."""
    if batch > ROWS:
        return f"{batch} sequences are more than the {ROWS} that the core reads weights once for"
    return parts_of(model)
