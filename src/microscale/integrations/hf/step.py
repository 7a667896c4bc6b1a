"""One token through a model over a cache that stays in place: run, captured in a CUDA graph, proved, replayed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from microscale.errors import one_line
from microscale.integrations.hf.ahead import Ahead
from microscale.integrations.hf.attention import NAME
from microscale.integrations.hf.chain_parts import chain_of
from microscale.integrations.hf.in_place import forward_of
from microscale.integrations.hf.quantizer import activation_dtype
from microscale.integrations.hf.step_cache import StepCache

MASKS = {
    "eager": True,
    "sdpa": False,
    NAME: False,
}  # attention that takes a mask: whether it is added to logits


class Step:
    """One token for each sequence of a batch: [B, 1] ids to logits, over a `StepCache`.

    The first call runs, and so compiles and loads all there is. The second is captured and replayed. The third does
    both, and they must agree to the bit: whatever the host had worked out from the cache's length would be that of the
    second. What cannot be captured, or disagrees, runs as the first did; `why` then says so.

    Attributes:
        why: why it is not replayed, in a sentence; None: it is, or will be.
        captured: it is.
        fused: it is a chain of kernels, and not the model's modules.
        why_modules: why it is its modules, in a sentence; None: it is not.
        greedy: the token that comes next is the likeliest, so its step may be launched ahead.
    """

    def __init__(self, model: Any, cache: StepCache, batch: int) -> None:
        self.model, self.cache, self.batch = model, cache, batch
        self.forward = forward_of(model)
        self.why: str | None = None
        self.captured = self.greedy = False
        self._ahead: Ahead | None = None
        self._added = activation_dtype(model) if MASKS[model.config._attn_implementation] else None
        self._own, self.why_modules = chain_of(model)
        self.fused = self._own is not None
        self._one_mask = not hasattr(model.config.get_text_config(decoder=True), "layer_types")
        with torch.inference_mode(False):
            self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self._runs = 0
        self._replay: Callable[[], None] | None = None
        self._output: Any = None

    def __call__(self, ids: Tensor) -> Any:
        """The model's output for the next token of each sequence."""
        if self.cache.length >= self.cache.capacity:
            raise IndexError(f"the cache has room for {self.cache.capacity} tokens")
        if self._ahead is not None:
            self.cache.length += 1
            again = self.greedy and self.cache.length < self.cache.capacity
            logits = self._ahead.step(ids, again)
            return CausalLMOutputWithPast(logits=logits, past_key_values=self.cache)
        self.ids.copy_(ids)
        if self._runs == 1 and self.why is None:
            self._capture()
        if self._replay is None:
            output = self.run()
        elif self._runs > 1:
            output = self._proved(self._replay)
        else:
            self._replay()
            output = self._output
        self._runs += 1
        self.cache.length += 1
        return output

    def finish(self) -> None:
        """No step follows: one that was launched ahead is waited for."""
        if self._ahead is not None:
            self._ahead.wait()

    def run(self) -> Any:
        """What is captured: only tensors that stay where they are come in, and the position moves on."""
        position = self.cache.position
        if self._own is not None:
            output = self._own(self.ids, self.cache)
            position.add_(1)
            return output
        masks: Any = self.cache.begin_step(self._added)
        if self._one_mask:
            (masks,) = masks.values()
        output = self.forward(
            input_ids=self.ids,
            attention_mask=masks,
            position_ids=position.expand(self.batch, 1),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        position.add_(1)
        return output

    def _capture(self) -> None:
        try:
            self._replay, self._output = capture(self.run)
        except Exception as error:  # noqa: BLE001 (whatever a model does that no graph can hold, it still runs)
            self.why = f"its step cannot be captured: {type(error).__name__}: {one_line(error)}"

    def _proved(self, replay: Callable[[], None]) -> Any:
        """The output of running, once replaying has given the same."""
        replay()
        replayed = self._output.logits.clone()
        self.cache.position.fill_(self.cache.length)  # wherever the replay left it
        output = self.run()
        if torch.equal(output.logits, replayed):
            self.captured = True
            self._ahead = Ahead(replay, self._output, self.ids, self.cache.position)
        else:
            self.why = "its captured step gave other logits than the step itself"
            self._replay = self._output = None
        return output


def capture(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What `run` launches on the current GPU: (replays it, its output, which that fills). Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    # torch's own stream for this stays on the GPU that was captured on first.
    with torch.cuda.graph(graph, stream=_stream(torch.cuda.current_device())):
        output = run()
    return graph.replay, output


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """What is captured on there; one a GPU, as each that multiplies keeps memory of cuBLAS'."""
    return torch.cuda.Stream(device)
