"""The next step of a greedy generation, launched before the host has looked at the token that it begins with.

transformers' loop chooses a token, asks whether it ends the generation and hands it to whoever reads along: 0.2 ms of
Python, for which the GPU would wait at every token. The token that it will choose is known on the GPU before, as the
likeliest one. So the step after it is replayed on a stream of its own meanwhile, and when the loop comes with another
token after all, that step is taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from microscale.integrations.hf.attention import triton_steps


class Ahead:
    """Replays steps, one of them ahead.

    Attributes:
        pending: the next step has been launched.
        missed: steps that were taken back.
    """

    def __init__(self, replay: Callable[[], None], output: Any, ids: Tensor, position: Tensor) -> None:
        """As `step.Step` holds them: `replay` reads `ids` [B, 1], fills `output.logits` and moves `position` on."""
        self.replay, self.output, self.ids, self.position = replay, output, ids, position
        self.pending, self.missed = False, 0
        cuda = ids.is_cuda
        self._stream: Any = torch.cuda.Stream(ids.device) if cuda else None
        self._guessed: Any = torch.cuda.Event() if cuda else None
        self._logits: Tensor | None = None
        self._choose = _chooser(ids)

    def step(self, ids: Tensor, again: bool) -> Tensor:
        """Logits for the next token of each sequence, in memory of their own.

        Args:
            again: launch the step behind it.
        """
        right = False
        if self.pending:
            if self._guessed is not None:
                torch.cuda.current_stream().wait_event(self._guessed)
            right = torch.equal(ids, self.ids)  # waits for the choice of `ids`, not for the step
            self.wait()
            if not right:
                self.missed += 1
                self.position.sub_(1)
        if not right:
            self.ids.copy_(ids)
            self.replay()
        # A copy, since the step behind fills `output` again. That of before is kept until now for the other stream.
        logits: Tensor = self.output.logits.clone()
        self._logits = logits
        if again:
            self._launch(logits)
        return logits

    def _launch(self, logits: Tensor) -> None:
        stream = self._stream
        aside: AbstractContextManager[Any] = nullcontext()
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            aside = torch.cuda.stream(stream)
        with aside:
            self._choose(logits[:, -1])
            if self._guessed is not None:
                self._guessed.record()
            self.replay()
        self.pending = True

    def wait(self) -> None:
        """Whatever comes next waits for what was launched."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self.pending = False


def _chooser(ids: Tensor) -> Callable[[Tensor], Any]:
    """What writes the likeliest tokens by logits [B, V] to ids [B, 1]."""
    if ids.is_cuda and triton_steps(ids.device):
        from microscale.backends.triton.likeliest import Likeliest

        return Likeliest(ids).choose
    return lambda logits: ids.copy_(logits.argmax(-1, keepdim=True))
