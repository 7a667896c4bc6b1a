"""Few rows times weights that are not quantised: a token's products, whose time is that of reading the weights.

A warp takes a row of weights, or two, and holds their first columns in registers before it looks at a token.
Weights do not depend on the kernel ahead, so on Hopper they are on their way while that one still runs. Several
matrices that meet the same tokens take one launch. The slow twin is `torch.nn.functional.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
# Programs that a multiprocessor has room for by registers: with all of a row, the first 2048 columns, and two rows.
_ALL, _FIRST, _PAIRS = 4, 8, 5
_WAVES = 8  # from which on how the last one fills the GPU matters little


@dataclass(frozen=True)
class Share:
    """What a warp takes.

    Attributes:
        rows: of weights; each number of a token that is read meets so many.
        held: times `_COLUMNS` of a row, in registers before a token is looked at.
        registers: a thread's at most; 0: as many as the compiler likes.
    """

    rows: int = 1
    held: int = 8
    registers: int = 0


def share(sizes: Sequence[int], k: int, tokens: int, itemsize: int, target: tiles.Target) -> Share:
    """For matrices [N, k] of these N and numbers of so many bytes, measured on Hopper with one token.

    What is in registers is on its way at once, and programs of a second wave begin when others have ended. So all of a
    row, of 16 bits, where every program is there at once or where there are many waves; else two rows where these
    need no second wave. With more tokens there are not registers enough.
    """
    steps, programs = -(-k // _COLUMNS), sum(-(-n // _WARPS) for n in sizes)
    if not target.early or tokens > 1 or itemsize > 2 or not 8 < steps <= 16:
        return Share(held=min(steps, 8))
    if programs <= _ALL * target.units or programs > _WAVES * _ALL * target.units:
        return Share(held=steps)
    paired = sum(-(-n // (2 * _WARPS)) for n in sizes)
    if programs > _FIRST * target.units and paired <= _PAIRS * target.units:
        return Share(rows=2, registers=96)
    return Share()


@triton.jit
def _columns(rows, first, K: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns of rows from `first` on, 0 past K."""
    k = first + tl.arange(0, COLUMNS)
    if first + COLUMNS <= K:
        return tl.load(rows + k[None, :])
    else:
        return tl.load(rows + k[None, :], mask=(k < K)[None, :], other=0.0)


@triton.jit
def _first_columns(rows, K: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr):
    """Tuple of the first HELD times COLUMNS of them."""
    found = ()
    for i in tl.static_range(HELD):
        part = _columns(rows, i * COLUMNS, K, COLUMNS)
        found = found + (part,)  # type: ignore[assignment] # noqa: RUF005 (Triton knows no unpacking)
    return found


@triton.jit
def _added(sums, weights, token):
    """Sums of each group of rows, and its weights by the token's columns."""
    found = ()
    for g in tl.static_range(len(sums)):
        more = sums[g] + weights[g].to(tl.float32) * token
        found = found + (more,)  # type: ignore[assignment] # noqa: RUF005
    return found


@triton.jit
def _rows(
    y, x, w, bias, at, N, K: tl.constexpr, width, M: tl.constexpr,
    WARPS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[:, n] for GROUPS times WARPS rows n of w from `at` on. y and x begin at the matrix' first result and the first
    token."""
    rows = ()
    held = ()
    for g in tl.static_range(GROUPS):
        n = at + g * WARPS + tl.arange(0, WARPS)
        # Past the last row the last again, for no one: a mask takes registers.
        row = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
        rows = rows + (row,)  # type: ignore[assignment] # noqa: RUF005
        held = held + (_first_columns(row, K, COLUMNS, HELD),)  # type: ignore[assignment] # noqa: RUF005
    more = ()
    for g in tl.static_range(GROUPS):
        n = at + g * WARPS + tl.arange(0, WARPS)
        added = tl.zeros((WARPS,), tl.float32)
        if HAS_BIAS:
            added = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        more = more + (added,)  # type: ignore[assignment] # noqa: RUF005
    if PDL:
        LINE: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
        REST: tl.constexpr = K - HELD * COLUMNS
        if REST > 0:
            rest = HELD * COLUMNS + tl.arange(0, triton.next_power_of_2(triton.cdiv(REST, LINE))) * LINE
            for g in tl.static_range(GROUPS):
                ask(rows[g] + tl.minimum(rest, K - 1)[None, :])
        gdc_wait()
        gdc_launch_dependents()
    for m in tl.static_range(M):
        sums = ()
        for _ in tl.static_range(GROUPS):
            sums = sums + (tl.zeros((WARPS, COLUMNS), tl.float32),)  # type: ignore[assignment] # noqa: RUF005
        # For every warp, in the order of the weights: one row for all would change hands through shared memory.
        tokens = x + m * K + tl.zeros((WARPS,), tl.int32)[:, None]
        for i in tl.static_range(HELD):
            weights = ()
            for g in tl.static_range(GROUPS):
                weights = weights + (held[g][i],)  # type: ignore[assignment] # noqa: RUF005
            sums = _added(sums, weights, _columns(tokens, i * COLUMNS, K, COLUMNS).to(tl.float32))
        for first in range(HELD * COLUMNS, K, COLUMNS):
            k = first + tl.arange(0, COLUMNS)
            token = tl.load(tokens + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)
            weights = ()
            for g in tl.static_range(GROUPS):
                late = tl.load(rows[g] + k[None, :], mask=(k < K)[None, :], other=0.0)
                weights = weights + (late,)  # type: ignore[assignment] # noqa: RUF005
            sums = _added(sums, weights, token)
        for g in tl.static_range(GROUPS):
            n = at + g * WARPS + tl.arange(0, WARPS)
            found = tl.sum(sums[g], 1) + more[g]
            tl.store(y + m * width + n, found.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _rows_kernel(
    y, x, w0, w1, w2, bias0, bias1, bias2, N0, N1, N2, K: tl.constexpr, M: tl.constexpr, COUNT: tl.constexpr,
    WARPS: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A branch for each matrix: an address that is chosen would not be known to be a multiple of 16."""
    ROWS: tl.constexpr = WARPS * GROUPS
    width = N0 + N1 + N2
    at = tl.program_id(0) * ROWS
    second = tl.cdiv(N0, ROWS) * ROWS
    third = second + tl.cdiv(N1, ROWS) * ROWS
    if COUNT == 1 or at < second:
        _rows(y, x, w0, bias0, at, N0, K, width, M, WARPS, GROUPS, COLUMNS, HELD, BIAS0, PDL)
    elif COUNT == 2 or at < third:
        _rows(y + N0, x, w1, bias1, at - second, N1, K, width, M, WARPS, GROUPS, COLUMNS, HELD, BIAS1, PDL)
    elif COUNT == 3:
        y += N0 + N1
        _rows(y, x, w2, bias2, at - third, N2, K, width, M, WARPS, GROUPS, COLUMNS, HELD, BIAS2, PDL)


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
    target = tiles.target(x.device)
    taken, pdl = share(sizes, k, m, x.itemsize, target), target.early
    few = {"maxnreg": taken.registers} if taken.registers else {}
    with tiles.on(x.device):
        _rows_kernel[(sum(-(-n // (_WARPS * taken.rows)) for n in sizes),)](
            y, x, *weights, *none, *biases, *none, *sizes, *(0 for _ in none), K=k, M=m, COUNT=len(sizes),
            WARPS=_WARPS, GROUPS=taken.rows, COLUMNS=_COLUMNS, HELD=taken.held,
            **{f"BIAS{i}": b is not None for i, b in enumerate([*biases, *none])},
            PDL=pdl, num_warps=_WARPS, **few, **tiles.launch(pdl, fused=x.dtype != torch.float32),
        )  # fmt: skip
    return y
