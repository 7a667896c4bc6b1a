"""Which expert computes which routes: sorted by expert and cut into tiles on the device, without atomics, so that the
order within an expert is that of the routes.

Few routes take one launch, in which every program reads all ids and writes what belongs to its expert. Many take two:
blocks of routes are counted, then each block finds its place from the counts of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton import tiles

# Routes up to which one launch is faster (H200: 3.3 us for 512, 8.5 for 4096, 106 for 65536).
ONE_LAUNCH = 1024
_BLOCK = 256  # of routes, where there are many


@dataclass(frozen=True)
class Table:
    """Int32 tensors on the device; each may have up to 3 entries more, which mean nothing.

    Attributes:
        order: [routes] the routes that have an expert, by expert.
        ends: [E] where each expert's routes end in `order`.
        tile_experts, tile_starts: [count] of each tile; expert -1: no tile.
        progress: [2 + count] for a kernel that counts in it: how many tiles there are stands in [1], and 0 in all
            others but those of no tile.
        count: room for the worst case, since the counts stay on the device.
    """

    order: Tensor
    ends: Tensor
    tile_experts: Tensor
    tile_starts: Tensor
    progress: Tensor
    count: int


@triton.jit
def key_of(ids, expert_map, i, routes, experts, known, HAS_MAP: tl.constexpr):
    """Of route i the local expert; `experts` for none, `experts` + 1 for an id that does not exist."""
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
    order,
    ends,
    tile_experts,
    tile_starts,
    progress,
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
    """One program per expert."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_E)
    key = key_of(ids, expert_map, lane, routes, experts, known, HAS_MAP)
    there = (lane < routes) & (key < experts)
    counts = tl.histogram(tl.where(there, key, 0), BLOCK_E, mask=there)
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
        tl.store(progress + 2 + tile, tl.zeros((BLOCK,), tl.int32), mask=here)
        if expert == 0:
            unused = (tile >= tl.sum(of_each, 0)) & (tile < count)
            tl.store(tile_experts + tile, tl.full((BLOCK,), -1, tl.int32), mask=unused)
        first += BLOCK
    if expert == 0:
        tl.store(progress, 0)
        tl.store(progress + 1, tl.sum(of_each, 0))
    if mine > 0:
        here = (key == expert) & (lane < routes)
        rank = tl.cumsum(here.to(tl.int32), 0)
        tl.store(order + start + rank - 1, lane, mask=here)


@triton.jit(do_not_specialize=["routes"])
def _count_kernel(
    counts,
    ids,
    expert_map,
    routes,
    experts,
    known,
    HAS_MAP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """counts[block, expert] of each block of routes."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = key_of(ids, expert_map, i, routes, experts, known, HAS_MAP)
    there = (i < routes) & (key < experts)
    found = tl.histogram(tl.where(there, key, 0), BLOCK_E, mask=there)
    tl.store(counts + tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), found)


@triton.jit(do_not_specialize=["routes", "count", "blocks"])
def _place_kernel(
    order,
    ends,
    tile_experts,
    tile_starts,
    progress,
    counts,
    ids,
    expert_map,
    routes,
    experts,
    known,
    count,
    blocks,
    HAS_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per block of routes: their places in `order`, and TILES of the tiles."""
    ROWS: tl.constexpr = 8192 // BLOCK_E if BLOCK_E < 4096 else 1  # many at once: every turn waits for memory
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    some_before = tl.zeros((ROWS, BLOCK_E), tl.int32)
    some = tl.zeros((ROWS, BLOCK_E), tl.int32)
    first = 0
    while first < blocks:
        row = first + tl.arange(0, ROWS)[:, None]
        c = tl.load(counts + row * BLOCK_E + e[None, :], mask=row < blocks, other=0)
        some += c
        some_before += tl.where(row < block, c, 0)
        first += ROWS
    before = tl.sum(some_before, 0)
    counted = tl.sum(some, 0)
    starts = tl.cumsum(counted, 0) - counted
    of_each = (counted + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(of_each, 0)
    if block == 0:
        tl.store(ends + e, starts + counted, mask=e < experts)
        tl.store(progress, 0)
        tl.store(progress + 1, tl.sum(of_each, 0))
    # An expert's tiles are those from last - of_each to last.
    tile = block * TILES + tl.arange(0, TILES)
    of = (tile[:, None] >= (last - of_each)[None, :]) & (tile[:, None] < last[None, :])  # [TILES, BLOCK_E]
    start = starts[None, :] + (tile[:, None] - (last - of_each)[None, :]) * BLOCK_M
    used = tile < tl.sum(of_each, 0)
    expert = tl.where(used, tl.sum(tl.where(of, e[None, :], 0), 1), -1)
    tl.store(tile_experts + tile, expert, mask=tile < count)
    tl.store(tile_starts + tile, tl.sum(tl.where(of, start, 0), 1), mask=used & (tile < count))
    tl.store(progress + 2 + tile, tl.zeros((TILES,), tl.int32), mask=tile < count)
    # A route comes after the routes of its expert in earlier blocks, and after those before it in this one. Sorted by
    # expert and place, a block's routes lie as they do in `order`; those without an expert come last.
    i = block * BLOCK + tl.arange(0, BLOCK)
    key = key_of(ids, expert_map, i, routes, experts, known, HAS_MAP)
    there = (i < routes) & (key < experts)
    mixed = tl.sort(tl.where(there, key, BLOCK_E) * BLOCK + tl.arange(0, BLOCK))
    key = mixed // BLOCK
    mine = tl.load(counts + block * BLOCK_E + e)
    at = starts + before - (tl.cumsum(mine, 0) - mine)
    place = tl.gather(at, tl.minimum(key, BLOCK_E - 1), 0) + tl.arange(0, BLOCK)
    tl.store(order + place, block * BLOCK + mixed % BLOCK, mask=key < BLOCK_E)


def route(
    topk_ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int, pdl: bool = False
) -> Table:
    """Of [M, T] global ids; M and T at least 1.

    Args:
        pdl: start before the kernel ahead ends, and wait for it; let the next one start early, which must wait.
    """
    routes, device = topk_ids.numel(), topk_ids.device
    # Each expert's last tile may be partly empty.
    count = min(routes, (routes + min(experts, routes) * (block_m - 1)) // block_m)
    block_e = max(triton.next_power_of_2(experts), 32)
    blocks = -(-routes // _BLOCK) if routes > ONE_LAUNCH else 0
    # One allocation; parts begin at multiples of 16 bytes, which the compiler is told of.
    sizes = [-(-n // 4) * 4 for n in (routes, experts, count, count, 2 + count, blocks * block_e)]
    *table, counts = torch.empty(sum(sizes), dtype=torch.int32, device=device).split(sizes)
    ids = (topk_ids.contiguous(), expert_map, routes, experts)
    known = experts if expert_map is None else expert_map.numel()
    constants = {"HAS_MAP": expert_map is not None, "BLOCK_E": block_e, "PDL": pdl}
    launch = tiles.launch(pdl)
    with tiles.on(device):
        if blocks == 0:
            block = max(triton.next_power_of_2(routes), 128)
            _route_kernel[(experts,)](
                *table, *ids, known, count, BLOCK_M=block_m, BLOCK=block, **constants, **launch
            )
        else:
            _count_kernel[(blocks,)](counts, *ids, known, BLOCK=_BLOCK, **constants, **launch)
            _place_kernel[(blocks,)](
                *table, counts, *ids, known, count, blocks, BLOCK_M=block_m, BLOCK=_BLOCK,
                TILES=triton.next_power_of_2(-(-count // blocks)), num_warps=8, **constants, **launch,
            )  # fmt: skip
    order, ends, tile_experts, tile_starts, progress = table
    return Table(order, ends, tile_experts, tile_starts, progress, count)


@triton.jit(do_not_specialize=["count"])
def _zero_kernel(progress, count, BLOCK: tl.constexpr):
    # Whoever is launched waits for this kernel, and so for those ahead.
    gdc_launch_dependents()
    gdc_wait()
    i = tl.arange(0, BLOCK)
    tl.store(progress + i, 0, mask=i < count)


def zeros(count: int, device: torch.device) -> Tensor:
    """[count] int32, at most 1024, for a kernel that sorts its routes itself and counts in them; on Hopper.

    Starts before the kernel ahead ends, and lets the next one start early, which must wait.
    """
    progress = torch.empty(count, dtype=torch.int32, device=device)
    _zero_kernel[(1,)](progress, count, BLOCK=1024, **tiles.launch(early=True))
    return progress
