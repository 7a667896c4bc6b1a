"""What the host of experts, a module of some model, tells of how it stores them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from microscale.quant import QuantTensor


class ExpertWeights(NamedTuple):
    """What an experts module holds: w13 [E, rows, H], w2 [E, H, I], and biases [E, rows], [E, H] or None."""

    w13: QuantTensor
    w2: QuantTensor
    b13: Tensor | None
    b2: Tensor | None


class ExpertsHost(NamedTuple):
    """How a kind of host module stores experts. Functions of modules' own level: copies and pickles name them.

    Attributes:
        weights: (w13, w2) that a module stores, as views.
        biases: (b13, b2) of a module, None where there is none.
        parts: the tensors, by name, as which a module stores w13 and w2: the inverse of `weights`.
    """

    weights: Callable[[nn.Module], tuple[QuantTensor, QuantTensor]]
    biases: Callable[[nn.Module], tuple[Tensor | None, Tensor | None]]
    parts: Callable[[nn.Module, QuantTensor, QuantTensor], dict[str, Tensor]]
