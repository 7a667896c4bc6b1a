"""Dequantise and multiply, on any device that torch runs on: the backend that refuses nothing.

Exactness before speed: weights are dequantised in float32, a tile of rows at a time, and multiplied in float32 (in
float64 where float32 cannot hold them); activations are really quantised where that is asked for. Only experts that are
routed to are touched.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from microscale import env
from microscale.activations import Activation
from microscale.backends import autograd
from microscale.formats import Format
from microscale.operands import check_linear, check_moe, local_ids, stored
from microscale.quant import QuantTensor, dequantize, has_float64
from microscale.reference import activate
from microscale.scales import scale_value


@dataclass(eq=False)
class Packed:
    """The canonical tensor itself, and, within the cache budget, its numbers.

    Attributes:
        weight: aliases what was given to `pack`.
        dense: the dequantised weight, bf16 where that is exact and float32 elsewhere; None: not cached.
        work: float32; float64 where some numbers may be 2^128 or larger, which would be infinite, and NaN beside a 0.
    """

    weight: QuantTensor
    dense: Tensor | None = None
    work: torch.dtype = torch.float32


class _Ledger:
    """Bytes that all live caches of this process hold, against MICROSCALE_EMULATION_CACHE."""

    held = 0

    @classmethod
    def give_back(cls, size: int) -> None:
        cls.held -= size


def pack(w: QuantTensor) -> Packed:
    """Nothing is repacked; the weight is dequantised for good where the cache budget still has room for all of it."""
    if w.device.type != "meta" and _beyond_float32(w):
        return Packed(w, work=torch.float64)
    exact_in_bf16 = w.format.scale == "e8m0"
    dtype = torch.bfloat16 if exact_in_bf16 else torch.float32
    size = w.codes.numel() // max(w.codes.shape[-1], 1) * w.shape[-1] * dtype.itemsize
    if w.device.type == "meta" or _Ledger.held + size > env.emulation_cache():
        return Packed(w)
    packed = Packed(w, dequantize(w, dtype))
    _Ledger.held += size
    weakref.finalize(packed, _Ledger.give_back, size)
    return packed


def unpack(packed: Packed) -> QuantTensor:
    """What was packed, itself."""
    return packed.weight


def linear(x: Tensor, w: Packed, bias: Tensor | None = None, *, act: Format | None = None) -> Tensor:
    """See `contract.Contract.linear`. Holds MICROSCALE_EMULATION_TILE bytes of float32 weights at a time."""
    check_linear(x, w.weight.shape, bias)
    return _multiply(stored(x, act, torch.float32), w.weight, w.dense, bias, w.work).to(x.dtype)


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Packed,
    w2: Packed,
    activation: Activation,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    expert_map: Tensor | None = None,
    weight_on_input: bool = False,
    act: Format | None = None,
) -> Tensor:
    """See `contract.Contract.moe`. Intermediates and the sum over experts are float32."""
    check_moe(
        x, topk_ids, topk_weights, w13.weight.shape, w2.weight.shape, activation, b13, b2, weight_on_input
    )
    local = local_ids(topk_ids, expert_map, w13.weight.shape[0])
    a = x.float()
    out = torch.zeros(x.shape[0], w2.weight.shape[-2], dtype=torch.float32, device=x.device)
    hit = [e for e in torch.unique(local).tolist() if e >= 0]  # the one place that waits for the device
    for e in hit:
        token, slot = torch.where(local == e)
        weight = topk_weights[token, slot, None].float()
        rows = a[token] * weight if weight_on_input else a[token]
        a13, a2 = (
            (_entry(w13.dense, e), _entry(b13, e), w13.work),
            (_entry(w2.dense, e), _entry(b2, e), w2.work),
        )
        h = _multiply(stored(rows, act, torch.float32), w13.weight[e], *a13)
        h = stored(activate(h, activation), act, torch.float32)
        y = _multiply(h, w2.weight[e], *a2)
        out = out.index_add(0, token, y if weight_on_input else y * weight)
    return out.to(x.dtype)


def _multiply(
    x: Tensor, w: QuantTensor, dense: Tensor | None, bias: Tensor | None, work: torch.dtype
) -> Tensor:
    """float32 [..., K] x [N, K] -> [..., N], a tile of whole block rows at a time, multiplied in `work`.

    Under autocast, too, which would round both to 16 bits.
    """
    n, k = w.shape
    height = w.format.block[0]
    step = max(env.emulation_tile() // (4 * max(k, 1)) // height, 1) * height
    parts = []
    for start in range(0, n, step):
        stop = min(start + step, n)
        tile = dequantize(w.rows(start, stop), work) if dense is None else dense[start:stop].float()
        with autograd.without_autocast(x.device):
            parts.append((x.to(work) @ tile.T).float())
    y = torch.cat(parts, dim=-1) if parts else x.new_zeros(*x.shape[:-1], 0)
    return y if bias is None else y + bias.float()


def _beyond_float32(w: QuantTensor) -> bool:
    """Whether the largest scale times the largest element reaches 2^128, and the device has float64."""
    if not w.scales.numel() or not has_float64(w.device):
        return False
    # Bytes grow with the scales that they stand for; NaN, the greatest of them, makes no number infinite.
    if w.format.scale == "f32":
        largest = w.scales.nan_to_num(0.0, 0.0, 0.0).abs().amax()
    else:
        nan = 0xFF if w.format.scale == "e8m0" else 0x7F
        magnitude = w.scales & nan
        largest = scale_value(magnitude.masked_fill(magnitude == nan, 0).amax(), w.format, torch.float64)
    outer = 1.0 if w.tensor_scale is None else float(w.tensor_scale.nan_to_num(0.0, 0.0, 0.0).abs().amax())
    element = max(abs(v) for v in w.format.element.values if math.isfinite(v))
    return float(largest) * outer * element >= 2.0**128


def _entry(t: Tensor | None, e: int) -> Tensor | None:
    return None if t is None else t[e]
