"""Few rows times weights that are not quantised: a token's products, whose time is that of reading the weights.

A warp takes a row of weights and holds its first 2048 columns in registers before it looks at a token.
Weights do not depend on the kernel ahead, so on Hopper they are on their way while that one still runs. Several
matrices that meet the same tokens take one launch. The slow twin is `torch.nn.functional.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton import tiles
from microscale.backends.triton.attend import ask

MOST = 4  # rows; each adds a multiplication to every weight that is read
MATRICES = 3
_WARPS = 4
_COLUMNS = 256  # that a warp reads at once, 16 bytes a thread where weights have 16 bits
_HELD = 8  # times that, before a token is looked at; more of it leaves room for fewer warps


@triton.jit
def _rows(
    y, x, w, bias, at, N, K: tl.constexpr, width, M: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[:, n] for WARPS rows n of w from `at` on. y and x begin at the matrix' first result and the first token."""
    n = at + tl.arange(0, WARPS)
    lane = tl.arange(0, COLUMNS)
    row = w + n.to(tl.int64)[:, None] * K
    inside = (n < N)[:, None]
    held = ()
    for i in tl.static_range(HELD):
        k = i * COLUMNS + lane
        step = tl.load(row + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        held = held + (step,)  # type: ignore[assignment] # noqa: RUF005 (Triton knows no unpacking)
    more = tl.zeros((WARPS,), tl.float32)
    if HAS_BIAS:
        more = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if PDL:
        LINE: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
        REST: tl.constexpr = K - HELD * COLUMNS
        if REST > 0:
            rest = HELD * COLUMNS + tl.arange(0, triton.next_power_of_2(triton.cdiv(REST, LINE))) * LINE
            ask(w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + tl.minimum(rest, K - 1)[None, :])
        gdc_wait()
        gdc_launch_dependents()
    for m in tl.static_range(M):
        acc = tl.zeros((WARPS, COLUMNS), tl.float32)
        # For every warp, in the order of the weights: one row for all would change hands through shared memory.
        tokens = x + m * K + tl.zeros((WARPS,), tl.int32)[:, None]
        for i in tl.static_range(HELD):
            k = i * COLUMNS + lane
            token = tl.load(tokens + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)
            acc += held[i].to(tl.float32) * token
        for first in range(HELD * COLUMNS, K, COLUMNS):
            k = first + lane
            token = tl.load(tokens + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)
            acc += tl.load(row + k[None, :], mask=inside & (k < K)[None, :], other=0.0).to(tl.float32) * token
        tl.store(y + m * width + n, (tl.sum(acc, 1) + more).to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _rows_kernel(
    y, x, w0, w1, w2, bias0, bias1, bias2, N0, N1, N2, K: tl.constexpr, M: tl.constexpr, COUNT: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A branch for each matrix: an address that is chosen would not be known to be a multiple of 16."""
    width = N0 + N1 + N2
    at = tl.program_id(0) * WARPS
    second = tl.cdiv(N0, WARPS) * WARPS
    third = second + tl.cdiv(N1, WARPS) * WARPS
    if COUNT == 1 or at < second:
        _rows(y, x, w0, bias0, at, N0, K, width, M, WARPS, COLUMNS, HELD, BIAS0, PDL)
    elif COUNT == 2 or at < third:
        _rows(y + N0, x, w1, bias1, at - second, N1, K, width, M, WARPS, COLUMNS, HELD, BIAS1, PDL)
    elif COUNT == 3:
        _rows(y + N0 + N1, x, w2, bias2, at - third, N2, K, width, M, WARPS, COLUMNS, HELD, BIAS2, PDL)


def linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Products of the same tokens with up to three matrices, side by side.

    Numerics: float32 sums, rounded once to x's dtype; a token's result depends on no other token, to the bit.

    Args:
        x: [M, K], contiguous, M from 1 to `MOST`, K a multiple of 16 bytes: where rows begin anywhere, the compiler
            may add up in another order for another M.
        weights: [N, K] each, contiguous and of x's dtype. biases: [N] or None for each.
    Returns:
        [M, sum of N].
    """
    (m, k), sizes = x.shape, [w.shape[0] for w in weights]
    y = torch.empty(m, sum(sizes), dtype=x.dtype, device=x.device)
    none = [None] * (MATRICES - len(sizes))
    pdl = tiles.target(x.device).early
    with tiles.on(x.device):
        _rows_kernel[(sum(-(-n // _WARPS) for n in sizes),)](
            y, x, *weights, *none, *biases, *none, *sizes, *(0 for _ in none), K=k, M=m, COUNT=len(sizes),
            WARPS=_WARPS, COLUMNS=_COLUMNS, HELD=min(_HELD, -(-k // _COLUMNS)),
            **{f"BIAS{i}": b is not None for i, b in enumerate([*biases, *none])},
            PDL=pdl, num_warps=_WARPS, enable_fp_fusion=x.dtype != torch.float32, **tiles.launch(pdl),
        )  # fmt: skip
    return y
