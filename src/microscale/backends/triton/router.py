"""A token and what a layer adds to it, the norm of that, and a small product with the norm: what stands between
attention and the choice of experts, in one kernel.

A program for a few rows of the router works out all of the norm by itself, from what lies in the L2 cache. That takes
less time than another kernel's beginning. The slow twin is `small.add_rms_norm` and `rows.linear`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton import tiles

_ROWS = 4  # of the router's in a program
_COLUMNS = 1024  # that its four warps read at once
_WIDEST = 8192  # bytes of a row; all that a program reads it holds in registers


@triton.jit
def _router_kernel(
    y, total, logits, x, more, norm, w, bias, eps, E,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr, TWICE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    first, token = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    n, lane = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    held = ()
    weights = ()
    for i in tl.static_range(CHUNKS):
        k = i * COLUMNS + lane
        rows = tl.load(w + n[:, None] * K + k[None, :], mask=(n < E)[:, None] & (k < K)[None, :], other=0.0)
        held = held + (rows,)  # type: ignore[assignment] # noqa: RUF005 (Triton knows no unpacking)
        weights = weights + (tl.load(norm + k, mask=k < K, other=0.0),)  # type: ignore[assignment] # noqa: RUF005
    if BIAS:
        added = tl.load(bias + n, mask=n < E, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sums = ()
    squares = tl.zeros((COLUMNS,), tl.float32)
    # No store among these loads, which would be waited for one after the other.
    for i in tl.static_range(CHUNKS):
        k = i * COLUMNS + lane
        value = tl.load(x + token * K + k, mask=k < K, other=0.0).to(tl.float32)
        value += tl.load(more + token * K + k, mask=k < K, other=0.0).to(tl.float32)
        whole = value.to(total.dtype.element_ty)
        squares += whole.to(tl.float32) * whole.to(tl.float32)
        sums = sums + (whole,)  # type: ignore[assignment] # noqa: RUF005
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(CHUNKS):
        k = i * COLUMNS + lane
        value = sums[i].to(tl.float32) * scale
        if TWICE:  # type: ignore[unreachable] # (to mypy the tuple is empty)
            value = value.to(y.dtype.element_ty).to(tl.float32)
        normed = (weights[i].to(tl.float32) * value).to(y.dtype.element_ty)
        if first == 0:
            tl.store(total + token * K + k, sums[i], mask=k < K)
            tl.store(y + token * K + k, normed, mask=k < K)
        acc += held[i].to(tl.float32) * normed.to(tl.float32)[None, :]
    found = tl.sum(acc, 1)
    if BIAS:
        found += added
    tl.store(logits + token * E + n, found.to(logits.dtype.element_ty), mask=n < E)


def takes(w: Tensor) -> bool:
    """Whether a program can hold its rows of a router's weights [E, K]."""
    return w.shape[1] * w.itemsize <= _WIDEST


def norm_and_product(
    x: Tensor, more: Tensor, norm: Tensor, eps: float, twice: bool, w: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`small.add_rms_norm`, and a small matrix times the norm.

    Numerics: theirs and `rows.linear`'s, sums in another order; a token's results depend on no other, to the bit.

    Args:
        x, more: [M, K], contiguous. norm: [K]. w: [E, K], contiguous, and `takes` it. bias: [E]; both of x's dtype.
        twice: rounded before the norm's weight, too.
    Returns:
        x + more [M, K], its norm [M, K], and logits [M, E].
    """
    (m, k), experts = x.shape, w.shape[0]
    total, y = torch.empty_like(x), torch.empty_like(x)
    logits = torch.empty(m, experts, dtype=x.dtype, device=x.device)
    pdl = tiles.target(x.device).early
    with tiles.on(x.device):
        _router_kernel[(-(-experts // _ROWS), m)](
            y, total, logits, x, more, norm, w, bias, eps, experts, K=k, ROWS=_ROWS, COLUMNS=_COLUMNS,
            BIAS=bias is not None, TWICE=twice, PDL=pdl, num_warps=4,
            **tiles.launch(pdl, fused=x.dtype != torch.float32),
        )  # fmt: skip
    return total, y, logits
