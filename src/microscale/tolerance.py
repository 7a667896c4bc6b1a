"""What a backend should give, in float64 on the same quantised operands, and how far from it a correct one may be.

Derived, not guessed. A backend that decodes exactly, accumulates in float32 and rounds once to its output dtype
stays within `linear_budget`. `moe_budget` also lets it round the intermediate once to the activations' dtype. Hardware
that adds more coarsely than float32 says so with an `Accumulation`. What is lost against the unquantised weights is
another budget and never enters here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.accumulation import FLOAT32, Accumulation
from microscale.activations import Activation
from microscale.formats import Format
from microscale.operands import local_ids, stored
from microscale.quant import QuantTensor, dequantize
from microscale.reference import activate

_EPS32 = 2.0**-24
# Weights dequantised to float64 at a time: a check at load must not show in the peak memory.
_TILE = 1 << 20
# Roundings of many intermediates add up like independent errors. Eight standard deviations of that sum are
# beyond what one run will ever see, and far below the sum of their worst cases.
_SIGMAS = 8.0


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: 2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Budget:
    """What is expected and what may be missed, elementwise.

    Attributes:
        expected: float64, the exact operands' result.
        bound: float64, same shape, the largest permitted distance from it; infinity where what is added up, or an
            intermediate, leaves float32 or the activations' dtype.
    """

    expected: Tensor
    bound: Tensor

    def worst(self, y: Tensor) -> float:
        """Largest |y - expected| / bound; above 1, or NaN where NaN is not expected, y is wrong. Infinity then."""
        error = (y.double() - self.expected).abs()
        same = torch.isnan(self.expected) & torch.isnan(y) | (self.expected == y.double())
        # Beyond the largest number, rounding makes an infinity of the same sign; beyond float32's, anything.
        overflown = self.expected.abs() + self.bound >= torch.finfo(y.dtype).max
        same |= overflown & torch.isinf(y) & (torch.sign(y) == torch.sign(self.expected))
        same |= torch.isinf(self.bound)
        ratio = torch.where(same, torch.zeros_like(error), error / self.bound)
        if ratio.numel() == 0:
            return 0.0
        return float(torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf).max())


def linear_budget(
    x: Tensor,
    w: QuantTensor,
    bias: Tensor | None = None,
    act: Format | None = None,
    dtype: torch.dtype | None = None,
    accumulation: Accumulation = FLOAT32,
) -> Budget:
    """For `linear`: K float32 additions lose at most K * 2^-24 of the sum of magnitudes, the output rounding half
    an ulp of the result, or half a subnormal step.

    Args:
        dtype: of the output; x's by default.
        accumulation: how products are added up.
    """
    a = stored(x, act, torch.float64)
    y, magnitude, spread = _products(a, _cuts(a, accumulation), w)
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    sums = (w.shape[-1] + 2) * _EPS32 * magnitude + _SIGMAS * spread.sqrt()
    return Budget(y, sums + _output_rounding(y, dtype or x.dtype) + _leaves(magnitude, torch.float32))


def dense_budget(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Budget:
    """For a product with weights [N, K] that are not quantised: as `linear_budget`."""
    a, b = x.double(), w.double().T
    y, magnitude = a @ b, a.abs() @ b.abs()
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    sums = (w.shape[-1] + 2) * _EPS32 * magnitude + _leaves(magnitude, torch.float32)
    return Budget(y, sums + _output_rounding(y, x.dtype))


def moe_budget(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: QuantTensor,
    w2: QuantTensor,
    activation: Activation,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    expert_map: Tensor | None = None,
    weight_on_input: bool = False,
    act: Format | None = None,
    dtype: torch.dtype | None = None,
    accumulation: Accumulation = FLOAT32,
) -> Budget:
    """For `moe`: the first product's error carried through the activation (by trying both ends of its interval),
    one rounding of the intermediate, the second product's own error, one rounding of each expert's share, and the
    output rounding.
    """
    dtype = dtype or x.dtype
    u = unit_roundoff(dtype)
    a = x.double()
    systematic = torch.zeros(x.shape[0], w2.shape[-2], dtype=torch.float64, device=x.device)
    variance, y = systematic.clone(), systematic.clone()
    local = local_ids(topk_ids, expert_map, w13.shape[0])
    for e in [e for e in torch.unique(local).tolist() if e >= 0]:
        token, slot = torch.where(local == e)
        weight = topk_weights[token, slot, None].double()
        rows = a[token] * weight if weight_on_input else a[token]
        after = torch.ones_like(weight) if weight_on_input else weight
        # A weight on the input may be rounded into the input's dtype before the product.
        input_error = (u if weight_on_input else 0.0) * rows.abs()
        rows = stored(rows, act, torch.float64)
        h, magnitude, spread = _products(rows, _either(input_error, _cuts(rows, accumulation)), w13[e])
        if b13 is not None:
            h, magnitude = h + b13[e].double(), magnitude + b13[e].double().abs()
        error = (w13.shape[-1] + 2) * _EPS32 * magnitude + _SIGMAS * spread.sqrt() + u * h.abs()
        wild = _leaves(magnitude, torch.float32).sum(dim=-1, keepdim=True)
        middle, error = _through(h, error, activation, act, dtype)
        wild = wild + _leaves(middle, dtype).sum(dim=-1, keepdim=True)
        part, magnitude, spread = _products(middle, _either(error, _cuts(middle, accumulation)), w2[e])
        if b2 is not None:
            part, magnitude = part + b2[e].double(), magnitude + b2[e].double().abs()
        wild = wild + _leaves(magnitude * after.abs().clamp(min=1), torch.float32)
        systematic.index_add_(0, token, (w2.shape[-1] + 4) * _EPS32 * magnitude * after.abs() + wild)
        variance.index_add_(0, token, spread * after.square())
        variance.index_add_(0, token, (u * part * after).square())
        y.index_add_(0, token, part * after)
    return Budget(y, systematic + _SIGMAS * variance.sqrt() + _output_rounding(y, dtype))


def _cuts(x: Tensor, accumulation: Accumulation) -> Tensor:
    """What a coarse adder loses, written as an error of x: `_products` then makes the right variance of it."""
    return accumulation.deviation * x if accumulation.coarse else torch.zeros_like(x)


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Independent errors of the same numbers, together."""
    return (a.square() + b.square()).sqrt()


def _products(x: Tensor, error: Tensor, w: QuantTensor) -> tuple[Tensor, Tensor, Tensor]:
    """x W^T, |x| |W|^T and error^2 (W^2)^T, in float64; w is dequantised once."""
    n, k = w.shape
    height = w.format.block[0]
    step = max(_TILE // max(k, 1) // height, 1) * height
    parts = []
    for start in range(0, n, step):
        tile = dequantize(w.rows(start, min(start + step, n)), torch.float64).T
        parts.append((x @ tile, x.abs() @ tile.abs(), error.square() @ tile.square()))
    if not parts:
        empty = x.new_zeros(*x.shape[:-1], 0)
        return empty, empty, empty
    first, second, third = (torch.cat(p, dim=-1) for p in zip(*parts, strict=True))
    return first, second, third


def _through(
    h: Tensor, error: Tensor, activation: Activation, act: Format | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The activated (and quantised) intermediate, and how far its inputs' error can move it."""
    u, middle = unit_roundoff(dtype), activate(h, activation)
    signs = [(1, 1), (-1, -1)] + ([(1, -1), (-1, 1)] if activation.gated else [])
    moved = torch.zeros_like(middle)
    for gate, up in signs:
        sign = torch.empty_like(h).fill_(gate)
        if activation.interleaved:
            sign[..., 1::2] = up
        elif activation.gated:
            sign[..., h.shape[-1] // 2 :] = up
        moved = torch.maximum(moved, (activate(h + sign * error, activation) - middle).abs())
    # Rounded once; what is subnormal in `dtype` to a step there, and in float32 maybe to 0.
    moved = moved + u * middle.abs() + max(2 * u * torch.finfo(dtype).smallest_normal, 2.0**-126)
    if act is None:
        return middle, moved
    rounded = stored(middle, act, torch.float64)
    # The largest number of a block makes its scale, and a row's the tensor scale. Where these move against each other,
    # or against the rest, numbers meet the neighbouring scale, which moving all of them together never shows.
    together = torch.ones_like(middle)
    outward = torch.where(middle < 0, -together, together)
    trials = [together, outward]
    for peak in _peaks(middle.abs(), moved, act):
        trials += [torch.where(peak, -sign, sign) for sign in trials[1:]]
    trials += [-sign for sign in trials]
    moves = [(stored(middle + sign * moved, act, torch.float64) - rounded).abs() for sign in trials]
    return rounded, torch.stack(moves).amax(dim=0)


def _peaks(size: Tensor, moved: Tensor, act: Format) -> list[Tensor]:
    """Where the numbers are that may make a block's scale, and those that may make a tensor scale, in [..., K]."""
    k, block = size.shape[-1], act.block[1]
    if k == 0:
        return []

    def largest(least: Tensor, most: Tensor) -> Tensor:
        return most >= least.amax(dim=-1, keepdim=True)

    parts = [F.pad(end, (0, -k % block)).unflatten(-1, (-1, block)) for end in (size - moved, size + moved)]
    of_block = largest(*parts).flatten(-2)[..., :k]
    return [of_block, largest(size - moved, size + moved)] if act.tensor_scale else [of_block]


def _leaves(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Infinity where a dtype cannot hold x, 0 elsewhere."""
    beyond = x.abs() * (1 + unit_roundoff(dtype)) > torch.finfo(dtype).max
    return torch.where(beyond & torch.isfinite(x), math.inf, 0.0)


def _output_rounding(y: Tensor, dtype: torch.dtype) -> Tensor:
    # The rounded value may be the next power of two, whose unit is larger; 1 % covers the accumulation before it.
    u = unit_roundoff(dtype)
    return 1.01 * u * y.abs() + 2 * u * torch.finfo(dtype).smallest_normal
