"""What else a token needs, each in one kernel where torch has many: norms, routes, and a gate between two products.

On Hopper the kernels of a token start early: each lets the next one start before it waits for the one ahead, so that
weights of a product behind them are on their way meanwhile (`rows`). All wait before they end, so what a kernel sees
is all that lies behind it; and a product lets the next kernel start only once it has waited, so that weights which
are read early are older than the kernels that are still running.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton import tiles
from microscale.backends.triton.keys import keys_of, logit_of, place_of


@triton.jit
def _rms_norm_kernel(
    y, total, x, more, w, eps, N, BLOCK: tl.constexpr, SHARES: tl.constexpr, TWICE: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * N
    n = tl.arange(0, BLOCK)
    weight = tl.load(w + n, mask=n < N, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row + n, mask=n < N, other=0.0).to(tl.float32)
    if SHARES > 0:
        added = tl.load(more + row * SHARES + n, mask=n < N, other=0.0).to(tl.float32)
        for t in tl.static_range(1, SHARES):
            added += tl.load(more + row * SHARES + t * N + n, mask=n < N, other=0.0).to(tl.float32)
        value += added.to(total.dtype.element_ty).to(tl.float32)
        whole = value.to(total.dtype.element_ty)
        tl.store(total + row + n, whole, mask=n < N)
        value = whole.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / N + eps)
    value = value * scale
    if TWICE:
        value = value.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row + n, (weight * value).to(y.dtype.element_ty), mask=n < N)


def rms_norm(x: Tensor, weight: Tensor, eps: float, twice: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in float32, rounded once to x's dtype.

    Args:
        x: [..., H], contiguous. weight: [H].
        twice: rounded before the weight, too.
    """
    return _norm(x, None, weight, eps, twice)[1]


def add_rms_norm(
    x: Tensor, more: Tensor, weight: Tensor, eps: float, twice: bool = False
) -> tuple[Tensor, Tensor]:
    """x + more, and `rms_norm` of it. The sum is rounded to x's dtype.

    Args:
        x: [..., H], contiguous.
        more: as x; or [..., T, H] in any dtype, parts that are added up first, in their order in float32, and rounded.
    """
    return _norm(x, more, weight, eps, twice)


def _norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float, twice: bool) -> tuple[Tensor, Tensor]:
    y, n = torch.empty_like(x), weight.numel()
    total = x if more is None else torch.empty_like(x)
    shares = 0 if more is None else more.numel() // x.numel()
    pdl, block = tiles.target(x.device).early, triton.next_power_of_2(n)
    # On Hopper its loads share a multiprocessor with those of the product behind it: many threads have them all under
    # way before these, and leave less room.
    warps = 16 if pdl and block >= 2048 else 8
    with tiles.on(x.device):
        _rms_norm_kernel[(x.numel() // n,)](
            y, total, x, more, weight, eps, n, BLOCK=block, SHARES=shares, TWICE=twice, PDL=pdl,
            num_warps=warps, **tiles.launch(pdl),
        )  # fmt: skip
    return total, y


@triton.jit
def _route_kernel(
    ids, weights, logits, E, TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    ALL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    e, t = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    every = keys_of(logits + row * E, e, E, SIZE)
    left = every
    chosen = tl.full((SLOTS,), float("-inf"), tl.float32)
    expert = tl.zeros((SLOTS,), tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.max(left, 0)
        chosen = tl.where(t == i, logit_of(best, logits.dtype.element_ty, SIZE), chosen)
        expert = tl.where(t == i, place_of(best, SIZE).to(tl.int32), expert)
        left = tl.where(left == best, -(1 << 2 * SIZE - 1), left)  # less than any key
    greatest = tl.max(chosen, 0)
    share = tl.exp(chosen - greatest)
    if ALL:
        every_share = tl.exp(logit_of(every, logits.dtype.element_ty, SIZE) - greatest)
        share = share / tl.sum(every_share, 0)
    else:
        share = share / tl.sum(share, 0)
    tl.store(ids + row * TOP_K + t, expert.to(tl.int64), mask=t < TOP_K)
    tl.store(weights + row * TOP_K + t, share.to(weights.dtype.element_ty), mask=t < TOP_K)


def route(
    logits: Tensor, top_k: int, of_all: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The greatest logits of each row, softmax over them in float32, rounded.

    Among equal ones the lower expert is first. A row with a NaN or an infinity has weights that are NaN.

    Args:
        logits: [M, E], contiguous, with E of at least `top_k` and less than 2^16.
        of_all: softmax is over all of a row.
        dtype: of the weights; None: of the logits.
    Returns:
        weights [M, top_k], and int64 ids [M, top_k].
    """
    rows, experts = logits.shape
    weights = torch.empty(rows, top_k, dtype=dtype or logits.dtype, device=logits.device)
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=logits.device)
    pdl = tiles.target(logits.device).early
    with tiles.on(logits.device):
        _route_kernel[(rows,)](
            ids, weights, logits, experts, TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k),
            BLOCK=triton.next_power_of_2(experts), SIZE=8 * logits.itemsize, ALL=of_all, PDL=pdl, num_warps=1,
            **tiles.launch(pdl),
        )  # fmt: skip
    return weights, ids


@dataclass(frozen=True)
class Choice:
    """What `route` is to choose by, for whoever may do without its launch.

    Attributes:
        logits, top_k, of_all, dtype: its arguments.
    """

    logits: Tensor
    top_k: int
    of_all: bool = False
    dtype: torch.dtype | None = None

    def routes(self) -> tuple[Tensor, Tensor]:
        """What it returns."""
        return route(self.logits, self.top_k, self.of_all, self.dtype)

    @property
    def block(self) -> int:
        """A power of two of experts that a warp of each program may look at instead; 0: not these."""
        rows, experts = self.logits.shape
        few = rows == 1 and experts <= 256 and self.logits.itemsize == 2 and not self.of_all
        return max(triton.next_power_of_2(experts), 32) if few else 0


@triton.jit
def _gate_kernel(y, gate, up, N, gate_m, up_m, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    g = tl.load(gate + row * gate_m + n, mask=n < N, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_m + n, mask=n < N, other=0.0).to(tl.float32)
    h = (g / (1.0 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * N + n, (h * u).to(y.dtype.element_ty), mask=n < N)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, each rounded to their dtype, as torch's operators round them.

    Args:
        gate, up: [M, I] with columns side by side.
    Returns:
        [M, I], contiguous.
    """
    m, n = gate.shape
    y = torch.empty(m, n, dtype=gate.dtype, device=gate.device)
    pdl = tiles.target(gate.device).early
    with tiles.on(gate.device):
        _gate_kernel[(m, -(-n // 512))](
            y, gate, up, n, gate.stride(0), up.stride(0), BLOCK=512, PDL=pdl, **tiles.launch(pdl)
        )
    return y
