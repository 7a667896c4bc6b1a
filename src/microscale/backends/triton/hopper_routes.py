"""Whose a tile of the experts on Hopper is: as routing has listed, or of one token by its ids or its router's logits.

By logits every program chooses for itself, to the bit as `small.route` does, whose launch this spares: what it takes is
less than a kernel's beginning, and w2's programs do it while w13 still runs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from microscale.backends.triton import keys, routing
from microscale.backends.triton.hopper_decode import accumulator, store_layout

key_of = gluon.jit(routing.key_of.fn)
keys_of = gluon.jit(keys.keys_of.fn)
place_of = gluon.jit(keys.place_of.fn)
logit_of = gluon.jit(keys.logit_of.fn)


@gluon.jit
def _every(logits, experts, BLOCK: gl.constexpr):
    """Keys of all experts, in each warp."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([BLOCK // 32], [32], [gl.num_warps()], [0])
    return keys_of(logits, gl.arange(0, BLOCK, LAYOUT), experts, 16)


@gluon.jit
def _without(every, best):
    return gl.where(every == best, -(1 << 31), every)


@gluon.jit
def expert_of(
    tile, tile_experts, expert_map, experts, known, DIRECT: gl.constexpr, HAS_MAP: gl.constexpr, BLOCK: gl.constexpr
):  # fmt: skip
    """int64, of a tile; -1: nothing to do. DIRECT: a tile is a route, and `tile_experts` the ids; or, with BLOCK, the
    logits of so many experts."""
    if BLOCK:
        left = _every(tile_experts, experts, BLOCK)
        best = gl.max(left, 0)
        for _ in range(tile):
            left = _without(left, best)
            best = gl.max(left, 0)
        expert = place_of(best, 16)
    elif DIRECT:
        key = key_of(tile_experts, expert_map, tile, tile + 1, experts, known, HAS_MAP)
        expert = gl.where(key < experts, key, -1)
    else:
        expert = gl.load(tile_experts + tile)
    return expert.to(gl.int64)


@gluon.jit
def weight_of(tile, logits, weights, experts, TOP_K: gl.constexpr, SLOTS: gl.constexpr, BLOCK: gl.constexpr):
    """float32, of a tile, by the logits, rounded to what `weights` point to."""
    slot = gl.arange(0, SLOTS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    chosen = gl.full([SLOTS], float("-inf"), gl.float32, slot.type.layout)
    left = _every(logits, experts, BLOCK)
    for i in gl.static_range(TOP_K):
        best = gl.max(left, 0)
        chosen = gl.where(slot == i, logit_of(best, logits.dtype.element_ty, 16), chosen)
        left = _without(left, best)
    share = gl.exp(chosen - gl.max(chosen, 0))
    share = share / gl.sum(share, 0)
    return gl.sum(gl.where(slot == tile, share, 0.0), 0).to(weights.dtype.element_ty).to(gl.float32)


@gluon.jit
def only_route(place, weight, BLOCK_M: gl.constexpr, T: gl.constexpr):
    """As `hopper_results.routes_of`, of a tile that is one route with this weight."""
    ACC: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_M, gl.num_warps()))
    STORE: gl.constexpr = gl.SliceLayout(0, store_layout(T * 64, BLOCK_M, gl.num_warps()))
    route = gl.zeros([BLOCK_M], gl.int32, STORE) + place
    return route, gl.zeros([BLOCK_M], gl.float32, ACC) + weight
