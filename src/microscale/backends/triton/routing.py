"""Which expert computes which routes: sorted by expert and cut into tiles on the device, in one launch.

Every program reads all ids and writes what belongs to its expert, so nothing is shared, there are no atomics, and the
order within an expert is that of the routes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from microscale.backends.triton import tiles


@dataclass(frozen=True)
class Table:
    """Int32 tensors on the device; each may have up to 3 entries more, which mean nothing.

    Attributes:
        keys: [routes] the local expert, E for none, E + 1 for an id that does not exist.
        order: [routes] the routes that have an expert, by expert.
        ends: [E] where each expert's routes end in `order`.
        tile_experts, tile_starts: [count] of each tile; expert -1: no tile.
        count: room for the worst case, since the counts stay on the device.
    """

    keys: Tensor
    order: Tensor
    ends: Tensor
    tile_experts: Tensor
    tile_starts: Tensor
    count: int


@triton.jit
def _key(ids, expert_map, i, routes, experts, known, HAS_MAP: tl.constexpr):
    e = tl.load(ids + i, mask=i < routes, other=-1).to(tl.int64)
    inside = (e >= 0) & (e < known)
    if HAS_MAP:
        local = tl.load(expert_map + e, mask=inside, other=-1).to(tl.int64)
    else:
        local = e
    key = tl.where((e == -1) | (inside & (local == -1)), experts, experts + 1)
    return tl.where(inside & (local >= 0) & (local < experts), local, key).to(tl.int32)


@triton.jit(do_not_specialize=["routes", "count"])
def _route_kernel(
    keys,
    order,
    ends,
    tile_experts,
    tile_starts,
    ids,
    expert_map,
    routes,
    experts,
    known,
    count,
    HAS_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    first = 0
    while first < routes:
        i = first + lane
        key = _key(ids, expert_map, i, routes, experts, known, HAS_MAP)
        if expert == 0:
            tl.store(keys + i, key, mask=i < routes)
        there = (i < routes) & (key < experts)
        counts += tl.histogram(tl.where(there, key, 0), BLOCK_E, mask=there)
        first += BLOCK
    start = tl.sum(tl.where(e < expert, counts, 0), 0)
    mine = tl.sum(tl.where(e == expert, counts, 0), 0)
    tl.store(ends + expert, start + mine)
    # In tiles: before this expert, and of all experts.
    of_each = (counts + BLOCK_M - 1) // BLOCK_M
    before = tl.sum(tl.where(e < expert, of_each, 0), 0)
    first = 0
    while first < count:
        tile = first + lane
        here = (tile >= before) & (tile < before + (mine + BLOCK_M - 1) // BLOCK_M)
        tl.store(tile_experts + tile, tl.zeros((BLOCK,), tl.int32) + expert, mask=here)
        tl.store(tile_starts + tile, start + (tile - before) * BLOCK_M, mask=here)
        if expert == 0:
            unused = (tile >= tl.sum(of_each, 0)) & (tile < count)
            tl.store(tile_experts + tile, tl.full((BLOCK,), -1, tl.int32), mask=unused)
        first += BLOCK
    if mine > 0:
        first = 0
        while first < routes:
            i = first + lane
            here = (_key(ids, expert_map, i, routes, experts, known, HAS_MAP) == expert) & (i < routes)
            rank = tl.cumsum(here.to(tl.int32), 0)
            tl.store(order + start + rank - 1, i, mask=here)
            start += tl.sum(here.to(tl.int32), 0)
            first += BLOCK


def route(
    topk_ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int, pdl: bool = False
) -> Table:
    """Of [M, T] global ids; M and T at least 1.

    Args:
        pdl: let the next kernel start early; it must wait.
    """
    routes, device = topk_ids.numel(), topk_ids.device
    # Each expert's last tile may be partly empty.
    count = min(routes, (routes + min(experts, routes) * (block_m - 1)) // block_m)
    # One allocation; parts begin at multiples of 16 bytes, which the compiler is told of.
    sizes = [-(-n // 4) * 4 for n in (routes, routes, experts, count, count)]
    keys, order, ends, tile_experts, tile_starts = torch.empty(
        sum(sizes), dtype=torch.int32, device=device
    ).split(sizes)
    block = min(max(triton.next_power_of_2(routes), 128), 4096)
    with tiles.on(device):
        _route_kernel[(experts,)](
            keys, order, ends, tile_experts, tile_starts, topk_ids.contiguous(), expert_map, routes, experts,
            experts if expert_map is None else expert_map.numel(), count,
            HAS_MAP=expert_map is not None, BLOCK_M=block_m, BLOCK_E=max(triton.next_power_of_2(experts), 32),
            BLOCK=block, PDL=pdl, num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
    return Table(keys, order, ends, tile_experts, tile_starts, count)
