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
    STORE: gl.constexpr = store_layout(OUT, WARPS)
    out = gl.convert_layout(out.to(h.dtype.element_ty), STORE)
    n = block * OUT + gl.arange(0, OUT, gl.SliceLayout(1, STORE))
    place = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORE))
    gl.store(
        h + place.to(gl.int64)[None, :] * WIDTH + n[:, None],
        out,
        mask=(n < WIDTH)[:, None] & (place < end)[None, :],
    )


@gluon.jit
def weighted(
    shares, acc, row_scale, bias, order, topk_weights, expert, first, start, end, N,
    ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, WEIGHT_ON_INPUT: gl.constexpr, DIRECT: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """What w2 gives for BLOCK_M places from `start` on, from the sums to where it belongs."""
    WARPS: gl.constexpr = gl.num_warps()
    ACC: gl.constexpr = accumulator(BLOCK_M, WARPS)
    rows = gl.minimum(slots(first, first + T // 2, T, gl.SliceLayout(1, ACC)), N - 1)
    acc = finish(acc, row_scale, bias, expert * N + rows, ROW_SCALE, HAS_BIAS)
    if not WEIGHT_ON_INPUT:
        place = gl.minimum(start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC)), end - 1)
        acc = acc * gl.load(topk_weights + routes_at(order, place, DIRECT)).to(gl.float32)[None, :]
    STORE: gl.constexpr = store_layout(T * 64, WARPS)
    out = gl.convert_layout(in_order(acc.to(shares.dtype.element_ty), T, BLOCK_M), STORE)
    n = first * 64 + gl.arange(0, T * 64, gl.SliceLayout(1, STORE))
    place = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORE))
    route = routes_at(order, gl.minimum(place, end - 1), DIRECT).to(gl.int64)
    gl.store(shares + route[None, :] * N + n[:, None], out, mask=(n < N)[:, None] & (place < end)[None, :])
