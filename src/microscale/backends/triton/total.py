"""Each token's shares of its experts, added up in the order of its slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from microscale.backends.triton import tiles


@triton.jit
def _total_kernel(y, shares, keys, experts, N, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    if PDL:
        gdc_wait()
    for t in range(TOP_K):
        route = token * TOP_K + t
        key = tl.load(keys + route)
        # A share that nobody wrote is not read.
        acc += tl.load(shares + route * N + n, mask=(n < N) & (key < experts), other=0.0)
        acc = tl.where(key > experts, float("nan"), acc)
    tl.store(y + token * N + n, acc.to(y.dtype.element_ty), mask=n < N)


def total(
    shares: Tensor, keys: Tensor, tokens: int, experts: int, dtype: torch.dtype, pdl: bool = False
) -> Tensor:
    """float32 [routes, N] -> [tokens, N] in `dtype`.

    A route without an expert (key E) adds nothing; an id that does not exist (key E + 1) makes its token NaN.

    Args:
        pdl: the kernel may start before the one that writes the shares ends, and waits for it.
    """
    routes, n = shares.shape
    y = torch.empty(tokens, n, dtype=dtype, device=shares.device)
    launch = {"launch_pdl": True} if pdl else {}
    with tiles.on(shares.device):
        _total_kernel[(tokens * -(-n // 1024),)](
            y, shares, keys, experts, n, TOP_K=routes // tokens, BLOCK=1024, PDL=pdl, **launch
        )
    return y
