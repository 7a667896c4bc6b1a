"""Tokens in the order of their routes, an expert's one after the other, so that a tile of them is one bulk copy."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton.routing import Table


@gluon.jit(do_not_specialize=["top_k", "experts"])
def _in_order_kernel(ordered, x, order, ends, top_k, experts, K, BLOCK: gl.constexpr, PDL: gl.constexpr):
    """ordered[place, K] = x[token of the route at that place]; places without a route keep what they have."""
    place = gl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if place < gl.load(ends + experts - 1):
        token = (gl.load(order + place) // top_k).to(gl.int64)
        LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
        for start in range(0, K, BLOCK):
            k = start + gl.arange(0, BLOCK, LAYOUT)
            value = gl.load(x + token * K + k, mask=k < K)
            gl.store(ordered + place.to(gl.int64) * K + k, value, mask=k < K)


def tokens_in_order(table: Table, x: Tensor, top_k: int, experts: int, pdl: bool) -> Tensor:
    """bfloat16 [M, K] -> [routes, K], the tokens in the table's order, for a cut with `bulk`."""
    routes, k = x.shape[0] * top_k, x.shape[1]
    ordered = torch.empty(routes, k, dtype=x.dtype, device=x.device)
    _in_order_kernel[(routes,)](
        ordered, x.contiguous(), table.order, table.ends, top_k, experts, k,
        BLOCK=1024, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return ordered
