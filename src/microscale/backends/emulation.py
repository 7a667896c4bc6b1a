"""Dequantise and multiply, on any device that torch runs on: the backend that refuses nothing.

Exactness before speed: weights are dequantised in float32, a tile of rows at a time, and multiplied in float32;
activations are really quantised where that is asked for. Only experts that are routed to are touched.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from microscale import env
from microscale.activations import Activation
from microscale.formats import Format
from microscale.operands import check_linear, check_moe, local_ids, stored
from microscale.quant import QuantTensor, dequantize
from microscale.reference import activate


@dataclass(eq=False)
class Packed:
    """The canonical tensor itself, and, within the cache budget, its numbers.

    Attributes:
        weight: aliases what was given to `pack`.
        dense: the dequantised weight, bf16 where that is exact and float32 elsewhere; None: not cached.
    """

    weight: QuantTensor
    dense: Tensor | None = None


class _Ledger:
    """Bytes that all live caches of this process hold, against MICROSCALE_EMULATION_CACHE."""

    held = 0

    @classmethod
    def give_back(cls, size: int) -> None:
        cls.held -= size


def pack(w: QuantTensor) -> Packed:
    """Nothing is repacked; the weight is dequantised for good where the cache budget still has room for all of it."""
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
    return _multiply(stored(x, act, torch.float32), w.weight, w.dense, bias).to(x.dtype)


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
        h = _multiply(stored(rows, act, torch.float32), w13.weight[e], _entry(w13.dense, e), _entry(b13, e))
        h = stored(activate(h, activation), act, torch.float32)
        y = _multiply(h, w2.weight[e], _entry(w2.dense, e), _entry(b2, e))
        out = out.index_add(0, token, y if weight_on_input else y * weight)
    return out.to(x.dtype)


def _multiply(x: Tensor, w: QuantTensor, dense: Tensor | None, bias: Tensor | None) -> Tensor:
    """float32 [..., K] x [N, K] -> [..., N], a tile of whole block rows at a time."""
    n, k = w.shape
    height = w.format.block[0]
    step = max(env.emulation_tile() // (4 * max(k, 1)) // height, 1) * height
    parts = []
    for start in range(0, n, step):
        stop = min(start + step, n)
        tile = dequantize(w.rows(start, stop)) if dense is None else dense[start:stop].float()
        parts.append(x @ tile.T)
    y = torch.cat(parts, dim=-1) if parts else x.new_zeros(*x.shape[:-1], 0)
    return y if bias is None else y + bias.float()


def _entry(t: Tensor | None, e: int) -> Tensor | None:
    return None if t is None else t[e]
