"""Each token's shares of its experts, added up in the order of its slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton import tiles
from microscale.backends.triton.routing import key_of


@triton.jit
def _total_kernel(
    y,
    shares,
    ids,
    expert_map,
    experts,
    known,
    N,
    HAS_MAP: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    if PDL:
        gdc_launch_dependents()  # see `small`
    # The ids are older than the kernel before this one, whose programs have waited for them.
    keys = ()
    for t in tl.static_range(TOP_K):
        route = token * TOP_K + t
        key = key_of(ids, expert_map, route, route + 1, experts, known, HAS_MAP)
        keys = keys + (key,)  # type: ignore[assignment]  # noqa: RUF005
    if PDL:
        gdc_wait()
    for t in tl.static_range(TOP_K):
        route = token * TOP_K + t
        key = keys[t]
        # A share that nobody wrote is not read.
        acc += tl.load(shares + route * N + n, mask=(n < N) & (key < experts), other=0.0).to(tl.float32)
        acc = tl.where(key > experts, float("nan"), acc)
    tl.store(y + token * N + n, acc.to(y.dtype.element_ty), mask=n < N)


def total(
    shares: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    experts: int,
    dtype: torch.dtype,
    pdl: bool = False,
) -> Tensor:
    """[routes, N] -> [tokens, N] in `dtype`, added up in float32.

    A route without an expert adds nothing; an id that does not exist makes its token NaN.

    Args:
        topk_ids: [tokens, T] global ids; `experts` of them are here, found by the map.
        pdl: the kernel may start before the one that writes the shares ends, and waits for it.
    """
    (tokens, top_k), n = topk_ids.shape, shares.shape[1]
    y = torch.empty(tokens, n, dtype=dtype, device=shares.device)
    known = experts if expert_map is None else expert_map.numel()
    with tiles.on(shares.device):
        _total_kernel[(tokens * -(-n // 1024),)](
            y, shares, topk_ids.contiguous(), expert_map, experts, known, n,
            HAS_MAP=expert_map is not None, TOP_K=top_k, BLOCK=1024, PDL=pdl, **tiles.launch(pdl),
        )  # fmt: skip
    return y
