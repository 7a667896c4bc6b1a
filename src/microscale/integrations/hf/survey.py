"""What a model's packed weights are: how many, how many bytes, how far from a reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microscale.dense import DenseLinear
from microscale.errors import CheckpointError
from microscale.integrations.hf.experts import dense_weights, experts_modules, read
from microscale.nn import QuantLinear, runner_of
from microscale.quant import QuantTensor, dequantize
from microscale.quant_experts import QuantExperts

GROUPS = ("experts", "linear")


@dataclass(frozen=True)
class Row:
    """One packed module.

    Attributes:
        name: path in the model.
        group: "experts" or "linear".
        format: of its weights now.
        weights: how many numbers; biases are not counted, nor are their bytes.
        bytes_before, bytes_after: of the reference's weights and of these.
        signal, noise: sums of w^2 and of (w - q)^2, w the reference's numbers and q these.
    """

    name: str
    group: str
    format: str
    weights: int
    bytes_before: int
    bytes_after: int
    signal: float
    noise: float


@dataclass(frozen=True)
class Report:
    """Packed modules, in the model's order, and their sums."""

    rows: tuple[Row, ...]

    def of(self, group: str) -> Report:
        """The rows of one group."""
        return Report(tuple(row for row in self.rows if row.group == group))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that have rows."""
        return tuple(group for group in GROUPS if self.of(group).rows)

    @property
    def weights(self) -> int:
        """How many numbers."""
        return sum(row.weights for row in self.rows)

    @property
    def bytes_before(self) -> int:
        """Bytes of the reference's weights."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of the weights as they are, scales included."""
        return sum(row.bytes_after for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for one number; NaN without rows."""
        return 8 * self.bytes_after / self.weights if self.weights else math.nan

    @property
    def sqnr(self) -> float:
        """Signal to quantisation noise in dB: infinite where no number changed, NaN where there is none."""
        signal, noise = sum(row.signal for row in self.rows), sum(row.noise for row in self.rows)
        if math.isnan(noise) or not signal:
            return math.nan
        return 10 * math.log10(signal / noise) if noise else math.inf

    def __str__(self) -> str:
        lines = []
        for group in self.groups:
            part = self.of(group)
            formats = " ".join(sorted({row.format for row in part.rows}))
            lines.append(
                f"{group}: {len(part.rows)} modules, {part.weights:,} weights in {formats}, "
                f"{part.bytes_before:,} -> {part.bytes_after:,} bytes, SQNR {part.sqnr:.2f} dB"
            )
        return "\n".join(lines) or "nothing is packed"


def survey(model: nn.Module, reference: nn.Module | None = None) -> Report:
    """What is packed in a model now, against the same modules of a `reference` (by default, against itself).

    Raises:
        CheckpointError: the reference has no such module, or one of another shape.
    """
    theirs = {} if reference is None else {name: module for name, module, _ in packable(reference)}
    rows = []
    for name, module, group in packable(model):
        held = weights_of(module)
        if not all(isinstance(w, QuantTensor) for w in held.values()):
            continue
        if reference is not None and name not in theirs:
            raise CheckpointError(type(reference).__name__, "the reference has no such module", tensor=name)
        base = held if reference is None else weights_of(theirs[name])
        rows.append(row(name, group, base, held))
    return Report(tuple(rows))


def row(name: str, group: str, before: Weights, after: Weights) -> Row:
    """Compare a module's weights, one matrix at a time in float32."""
    signal = noise = 0.0
    for key, now in after.items():
        then = before.get(key)
        if then is None or tuple(then.shape) != tuple(now.shape):
            found = None if then is None else tuple(then.shape)
            problem = "the reference differs"
            raise CheckpointError(name, problem, tensor=key, expected=tuple(now.shape), found=found)
        for w, q in zip(matrices(then), matrices(now), strict=True):
            signal, noise = signal + _energy(w), noise + _energy(w - q)
    formats = {w.format.name for w in after.values() if isinstance(w, QuantTensor)}
    weights = sum(math.prod(w.shape) for w in after.values())
    return Row(name, group, " ".join(sorted(formats)), weights, nbytes(before), nbytes(after), signal, noise)


Weights = dict[str, Tensor | QuantTensor]


def packable(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, module, group) of everything that is packed or could be, in the model's order."""
    experts = dict(experts_modules(model))
    for name, module in model.named_modules():
        if name in experts:
            yield name, module, "experts"
        elif type(module) in (nn.Linear, DenseLinear, QuantLinear) and "forward" not in module.__dict__:
            yield name, module, "linear"  # a subclass, or another forward, may compute something else


def weights_of(module: nn.Module) -> Weights:
    """A module's weights, [E, N, K] or [N, K], packed or dense."""
    if isinstance(module, QuantLinear):
        return {"weight": module.weight}
    if isinstance(module, nn.Linear):
        return {"weight": module.weight.detach()}
    dense = dense_weights(module)
    if dense:
        return dict(dense)
    runner = runner_of(module)
    w13, w2 = runner.weights[:2] if isinstance(runner, QuantExperts) else read(module)
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return {first: w13, "down_proj": w2}


def matrices(w: Tensor | QuantTensor) -> Iterator[Tensor]:
    """The [N, K] float32 matrices of a weight, one at a time: memory is one expert's, not a layer's."""
    for part in [w] if len(w.shape) == 2 else (w[e] for e in range(w.shape[0])):
        yield dequantize(part) if isinstance(part, QuantTensor) else part.float()


def nbytes(weights: Weights) -> int:
    """Bytes of a module's weights."""
    return sum(w.nbytes for w in weights.values())


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
