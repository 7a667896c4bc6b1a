"""What the sums of w13 and w2 become on Hopper, and where it goes: see `hopper_moe`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from microscale.backends.triton import activation as _activation
from microscale.backends.triton.hopper_decode import accumulator, finish, in_order, slots, store_layout

activate = gluon.jit(_activation.activate.fn)


@gluon.jit
def routes_at(order, place, DIRECT: gl.constexpr):
    if DIRECT:
        return place
    else:
        return gl.load(order + place)


@gluon.jit
def span(tile, expert, tile_starts, ends, DIRECT: gl.constexpr):
    """A tile's first place in the order, and where its expert's places end."""
    if DIRECT:
        return tile, tile + 1
    else:
        return gl.load(tile_starts + tile), gl.load(ends + expert)


@gluon.jit
def activated(
    h, acc, row_scale, bias, order, topk_weights, expert, block, first, second, start, end,
    N, WIDTH, alpha, beta, limit,
    ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr,
    KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, DIRECT: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """What w13 gives for BLOCK_M places from `start` on, from the sums to where it belongs."""
    WARPS: gl.constexpr = gl.num_warps()
    OUT: gl.constexpr = T * 32 if GATED else T * 64
    ACC: gl.constexpr = accumulator(BLOCK_M, WARPS)
    if WEIGHT_ON_INPUT:
        place = gl.minimum(start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC)), end - 1)
        acc = acc * gl.load(topk_weights + routes_at(order, place, DIRECT)).to(gl.float32)[None, :]
    rows = gl.minimum(slots(first, second, T, gl.SliceLayout(1, ACC)), N - 1)
    acc = finish(acc, row_scale, bias, expert * N + rows, ROW_SCALE, HAS_BIAS)
    if GATED and not INTERLEAVED:
        both = in_order(acc, T, BLOCK_M).reshape([2, OUT, BLOCK_M]).permute([1, 2, 0])
        gate, up = gl.convert_layout(
            both, gl.BlockedLayout([2, 1, 2], [16, 2, 1], [1, WARPS, 1], [2, 0, 1])
        ).split()
        out = activate(gate, up, alpha, beta, limit, KIND, GATED, HAS_LIMIT)
    elif GATED:
        gate, up = acc.reshape([T * 4, 2, 8, BLOCK_M]).permute([0, 2, 3, 1]).split()
        out = activate(gate, up, alpha, beta, limit, KIND, GATED, HAS_LIMIT).reshape([OUT, BLOCK_M])
    else:
        out = in_order(activate(acc, acc, alpha, beta, limit, KIND, GATED, HAS_LIMIT), T, BLOCK_M)
    STORE: gl.constexpr = store_layout(OUT, BLOCK_M, WARPS)
    out = gl.convert_layout(out.to(h.dtype.element_ty), STORE)
    n = block * OUT + gl.arange(0, OUT, gl.SliceLayout(1, STORE))
    place = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORE))
    gl.store(
        h + place.to(gl.int64)[None, :] * WIDTH + n[:, None],
        out,
        mask=(n < WIDTH)[:, None] & (place < end)[None, :],
    )


@gluon.jit
def _routes_in(
    order, topk_weights, start, end,
    WEIGHT_ON_INPUT: gl.constexpr, DIRECT: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Routes of BLOCK_M places from `start` on, and their weights."""
    place = gl.minimum(start + gl.arange(0, BLOCK_M, LAYOUT), end - 1)
    route = routes_at(order, place, DIRECT)
    weight = route
    if not WEIGHT_ON_INPUT:
        weight = gl.load(topk_weights + route).to(gl.float32)
    return route, weight


@gluon.constexpr_function
def _early(BLOCK_M):
    """Of fewer tokens a thread has few loads, and handing numbers from thread to thread would cost more."""
    return BLOCK_M >= 32


@gluon.jit
def routes_of(
    order, topk_weights, start, end,
    WEIGHT_ON_INPUT: gl.constexpr, DIRECT: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """What `weighted` needs of the routes, asked for ahead of the product: two loads, one after the other.

    Args:
        EARLY: of fewer tokens, too: each thread its own.
    """
    if EARLY:
        ACC: gl.constexpr = gl.SliceLayout(0, accumulator(BLOCK_M, gl.num_warps()))
        STORE: gl.constexpr = gl.SliceLayout(0, store_layout(T * 64, BLOCK_M, gl.num_warps()))
        route, _ = _routes_in(order, topk_weights, start, end, True, DIRECT, BLOCK_M, STORE)
        _, weight = _routes_in(order, topk_weights, start, end, WEIGHT_ON_INPUT, DIRECT, BLOCK_M, ACC)
        return route, weight
    elif _early(BLOCK_M):
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        return _routes_in(order, topk_weights, start, end, WEIGHT_ON_INPUT, DIRECT, BLOCK_M, LAYOUT)
    else:
        return order, topk_weights


@gluon.jit
def weighted(
    shares, acc, row_scale, bias, routes, expert, first, start, end, N,
    ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, DIRECT: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """What w2 gives for BLOCK_M places from `start` on, from the sums to where it belongs; routes: of `routes_of`."""
    WARPS: gl.constexpr = gl.num_warps()
    ACC: gl.constexpr = accumulator(BLOCK_M, WARPS)
    STORE: gl.constexpr = store_layout(T * 64, BLOCK_M, WARPS)
    TOKENS: gl.constexpr = gl.SliceLayout(0, STORE)
    rows = gl.minimum(slots(first, first + T // 2, T, gl.SliceLayout(1, ACC)), N - 1)
    acc = finish(acc, row_scale, bias, expert * N + rows, ROW_SCALE, HAS_BIAS)
    if EARLY:
        route, weight = routes
    elif _early(BLOCK_M):
        route = gl.convert_layout(routes[0], TOKENS)
        weight = gl.convert_layout(routes[1], gl.SliceLayout(0, ACC))
    else:
        route, _ = _routes_in(routes[0], routes[1], start, end, True, DIRECT, BLOCK_M, TOKENS)
        _, weight = _routes_in(
            routes[0], routes[1], start, end, WEIGHT_ON_INPUT, DIRECT, BLOCK_M, gl.SliceLayout(0, ACC)
        )
    if not WEIGHT_ON_INPUT:
        acc = acc * weight[None, :]
    out = gl.convert_layout(in_order(acc.to(shares.dtype.element_ty), T, BLOCK_M), STORE)
    n = first * 64 + gl.arange(0, T * 64, gl.SliceLayout(1, STORE))
    place = start + gl.arange(0, BLOCK_M, TOKENS)
    gl.store(
        shares + route.to(gl.int64)[None, :] * N + n[:, None],
        out,
        mask=(n < N)[:, None] & (place < end)[None, :],
    )
