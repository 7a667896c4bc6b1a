"""What is timed: layers of real models, or of a size given on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from microscale.activations import GPT_OSS, Activation
from microscale.errors import FormatError, brief
from microscale.formats import Format

_MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class Shape:
    """One layer.

    Attributes:
        n, k: output and input features (linear), or hidden size (MoE, both).
        experts, top_k, intermediate, activation: MoE only.
        bias: on every matrix.
    """

    name: str
    op: str
    n: int
    k: int
    experts: int = 0
    top_k: int = 0
    intermediate: int = 0
    activation: Activation | None = None
    bias: bool = False

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of one expert's matrices, or of the linear's only one."""
        if self.activation is None:
            return ((self.n, self.k),)
        return (self.activation.rows(self.intermediate), self.k), (self.n, self.intermediate)

    def bytes(self, fmt: Format) -> int:
        """Codes and scales of one expert, or of the linear: what a call has to read of it at the least."""
        return sum(
            n * fmt.packed_columns(k) + fmt.scale_bytes * prod(fmt.scale_shape(n, k))
            for n, k in self.matrices
        )

    def flops(self, m: int) -> int:
        """FLOPs of the products of `m` tokens; a multiplication and an addition are two."""
        return 2 * m * max(self.top_k, 1) * sum(n * k for n, k in self.matrices)


def _moe(name: str, experts: int, top_k: int, hidden: int, intermediate: int, gpt_oss: bool = False) -> Shape:
    activation = GPT_OSS if gpt_oss else Activation("silu")
    return Shape(name, "moe", hidden, hidden, experts, top_k, intermediate, activation, gpt_oss)


SHAPES = {
    s.name: s
    for s in (
        _moe("gpt-oss-20b", 32, 4, 2880, 2880, gpt_oss=True),
        _moe("qwen3-30b-a3b", 128, 8, 2048, 768),
        Shape("2880x2880", "linear", 2880, 2880),
        Shape("5120x2880", "linear", 5120, 2880),
        Shape("4096x4096", "linear", 4096, 4096),
    )
}


def parse_shape(text: str) -> Shape:
    """A name of `SHAPES`, "NxK" (linear), or "ExTxHxI" (MoE: experts, top-k, hidden, intermediate; SiLU).

    Raises:
        FormatError: none of these, or a size out of range.
    """
    if text in SHAPES:
        return SHAPES[text]
    if re.fullmatch(r"\d{1,9}x\d{1,9}(x\d{1,9}x\d{1,9})?", text, re.ASCII) is None:
        known = ", ".join(SHAPES)
        raise FormatError(
            f"unknown shape {brief(text)}; known: {known}, NxK (linear: outputs x inputs), "
            "ExTxHxI (MoE: experts x top-k x hidden x intermediate)"
        )
    sizes = [int(word) for word in text.split("x")]
    for size in sizes:
        if not 1 <= size <= _MAX_SIZE:
            raise FormatError(f"shape {text}: sizes are from 1 to {_MAX_SIZE}, not {size}")
    if len(sizes) == 2:
        return Shape(text, "linear", sizes[0], sizes[1])
    experts, top_k, hidden, intermediate = sizes
    if top_k > experts:
        raise FormatError(f"shape {text}: top-k {top_k} is more than the {experts} experts")
    return _moe(text, experts, top_k, hidden, intermediate)
