"""Perplexity of a language model on held-out tokens: one definition for every table, test and example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microscale.errors import MicroscaleError

# Bytes of logits and attention scores that one batch of windows may make.
BATCH_BYTES = 1 << 28
_ROWS_BYTES = 1 << 25  # float32 copies of logits at a time

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True, eq=False)
class Perplexity:
    """A model's loss on some tokens.

    Attributes:
        token_nll: [tokens] float32, -ln p of each predicted token given those before it in its window.
        window: predicted tokens of a full window.
        text_bytes: bytes of UTF-8 that the predicted tokens stand for; None: not known.
    """

    token_nll: Tensor
    window: int
    text_bytes: int | None = None

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return self.token_nll.numel()

    @property
    def nll(self) -> float:
        """Mean over tokens, in nats."""
        return float(self.token_nll.double().mean())

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def stderr(self) -> float:
        """Standard error of the perplexity as an estimate for more such text. NaN with fewer than two windows."""
        return self.perplexity * self._stderr(self.token_nll)

    @property
    def bits_per_byte(self) -> float | None:
        """Of text; comparable between tokenizers. None where the bytes are not known."""
        return self.nll * self.tokens / math.log(2) / self.text_bytes if self.text_bytes else None

    def change(self, base: Perplexity) -> tuple[float, float]:
        """perplexity / base's - 1, and its standard error. Paired: both models read the same tokens.

        Raises:
            MicroscaleError: they did not.
        """
        if self.tokens != base.tokens or self.window != base.window:
            mine, theirs = (self.tokens, self.window), (base.tokens, base.window)
            raise MicroscaleError(f"(tokens, window) are {mine} and {theirs}: not the same text")
        difference = self.token_nll.double() - base.token_nll.double()
        ratio = math.exp(min(float(difference.mean()), 700.0))
        return ratio - 1, ratio * self._stderr(difference)

    def _stderr(self, values: Tensor) -> float:
        """Of the mean. Neighbouring tokens are not independent draws; windows nearly are."""
        centred = values.double() - values.double().mean()
        sums = torch.stack([part.sum() for part in centred.split(self.window)])
        count = len(sums)
        if count < 2:
            return math.nan
        return math.sqrt(float(sums.square().sum()) * count / (count - 1)) / len(values)


def perplexity(
    model: Any,
    tokens: Tensor,
    window: int = 1024,
    progress: Progress | None = None,
    *,
    text_bytes: int | None = None,
) -> Perplexity:
    """Run a model over tokens in windows that do not overlap; every token but the first is predicted once.

    A window is `window` predicted tokens and the one before them, which is all that the model sees. The last one
    may be shorter. The model computes in its own dtype; log-softmax is float32.

    Args:
        model: called as `model(input_ids=[B, T], use_cache=False)`, gives `.logits` [B, T, V].
        tokens: [tokens] integers, at least two.
        progress: wraps the iterable of batches.
        text_bytes: bytes of text behind tokens[1:], for bits per byte.
    Raises:
        MicroscaleError: fewer than two tokens, or a window shorter than one.
    """
    if tokens.dim() != 1 or len(tokens) < 2:
        raise MicroscaleError(f"tokens: expected at least 2 in one dimension, found {list(tokens.shape)}")
    if window < 1:
        raise MicroscaleError(f"window: expected at least 1, found {window}")
    batches = list(_batches(tokens, window, _batch_size(model.config, window)))
    found = []
    with torch.inference_mode():
        for batch in progress(batches) if progress else batches:  # [B, T + 1]
            ids = batch.to(model.device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            found.append(_nll(logits, ids[:, 1:]).cpu())
    return Perplexity(torch.cat(found).clone(), window, text_bytes)


def _batches(tokens: Tensor, window: int, size: int) -> Iterator[Tensor]:
    """[B, window + 1], each row's last token the next row's first; then the rest, alone."""
    full = (len(tokens) - 1) // window
    if full:
        yield from tokens[: full * window + 1].unfold(0, window + 1, window).split(size)
    if full * window + 1 < len(tokens):
        yield tokens[None, full * window :]


def _batch_size(config: Any, window: int) -> int:
    """Windows whose logits, and one layer's attention scores, fit in BATCH_BYTES; at least one."""
    config = config.get_text_config()
    scores = int(getattr(config, "num_attention_heads", 1)) * window
    return max(BATCH_BYTES // (4 * window * max(int(config.vocab_size), scores)), 1)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, T, V], [B, T] -> [B * T] float32."""
    rows = max(_ROWS_BYTES // (4 * logits.shape[-1]), 1)
    parts = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in parts])
