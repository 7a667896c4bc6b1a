"""Tokens in the order of their routes, an expert's one after the other, so that a tile of them is one bulk copy."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton import tiles
from microscale.backends.triton.routing import Table

# Of a program, so that a thread has eight loads under way.
_PLACES, _COLUMNS = 8, 1024


@gluon.jit(do_not_specialize=["top_k", "experts"])
def _in_order_kernel(
    ordered, x, order, ends, top_k, experts, K, PLACES: gl.constexpr, COLUMNS: gl.constexpr, PDL: gl.constexpr
):
    """ordered[place, K] = x[token of the route at that place]; places without a route keep what they have."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    blocks = gl.cdiv(K, COLUMNS)
    place = gl.program_id(0) // blocks * PLACES + gl.arange(0, PLACES, gl.SliceLayout(1, LAYOUT))
    k = gl.program_id(0) % blocks * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    there = place < gl.load(ends + experts - 1)
    token = (gl.load(order + place, mask=there, other=0) // top_k).to(gl.int64)
    inside = there[:, None] & (k < K)[None, :]
    value = gl.load(x + token[:, None] * K + k[None, :], mask=inside)
    gl.store(ordered + place.to(gl.int64)[:, None] * K + k[None, :], value, mask=inside)


def tokens_in_order(table: Table, x: Tensor, top_k: int, experts: int, pdl: bool) -> Tensor:
    """bfloat16 [M, K] -> [routes, K], the tokens in the table's order, for a cut with `bulk`."""
    routes, k = x.shape[0] * top_k, x.shape[1]
    ordered = torch.empty(routes, k, dtype=x.dtype, device=x.device)
    _in_order_kernel[(-(-routes // _PLACES) * -(-k // _COLUMNS),)](
        ordered, x.contiguous(), table.order, table.ends, top_k, experts, k,
        PLACES=_PLACES, COLUMNS=_COLUMNS, PDL=pdl, num_warps=4, **tiles.launch(pdl),
    )  # fmt: skip
    return ordered
