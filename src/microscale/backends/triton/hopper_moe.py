"""The experts on Hopper: w13 with its activation is one kernel, w2 with the routing weight another; see `hopper`."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.activations import Activation
from microscale.backends.triton import activation as _activation
from microscale.backends.triton import tiles
from microscale.backends.triton.fragments import ROWS, Fragments
from microscale.backends.triton.hopper import (
    Cut,
    accumulator,
    aligned,
    buffers,
    copy_weights,
    finish,
    in_order,
    pointers,
    product,
    slots,
    store_layout,
)
from microscale.backends.triton.routing import Table, route
from microscale.backends.triton.total import total

activate = gluon.jit(_activation.activate.fn)


@gluon.jit(do_not_specialize=["top_k", "TILES", "CHUNKS", "STEPS"])
def _first_kernel(
    h, x, codes, scales, row_scale, bias, tile_experts, tile_starts, ends, order, topk_weights,
    top_k, N, WIDTH, K, TILES, CHUNKS, STEPS, alpha, beta, limit,
    SCALE: gl.constexpr, EVEN: gl.constexpr, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr,
    KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """h[sorted route, WIDTH] = activation(w13[e] @ x[token] + b13[e])."""
    WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = 1 if SCALE == "e8m0" else 2
    APART: gl.constexpr = GATED and not INTERLEAVED  # half the tiles are gates, half the ups WIDTH rows on
    OUT: gl.constexpr = T * 32 if GATED else T * 64
    blocks = gl.cdiv(WIDTH, OUT)
    tile = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = gl.load(tile_experts + tile).to(gl.int64)
    if expert >= 0:
        if APART:
            first = block * (T // 2)
            second = first + WIDTH // 64
        else:
            first = block * T
            second = first + T // 2
        xs, cs, ss = buffers(BLOCK_M, T, C, STAGES, WORDS)
        cp, sp = pointers(codes, scales, expert, first, second, TILES, CHUNKS, T, C, WORDS)
        for s in gl.static_range(STAGES - 1):
            copy_weights(cs, ss, cp, sp, s, s, STEPS, CHUNKS, T, C, WORDS, EVEN)
        start = gl.load(tile_starts + tile)
        end = gl.load(ends + expert)
        TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
        position = gl.minimum(start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TOKENS)), end - 1)
        token = (gl.load(order + position) // top_k).to(gl.int64)
        acc = product(
            x, token, xs, cs, ss, cp, sp, STEPS, CHUNKS, K, SCALE, EVEN, BLOCK_M, T, C, STAGES, OVERLAP
        )
        ACC: gl.constexpr = accumulator(BLOCK_M, WARPS)
        if WEIGHT_ON_INPUT:
            position = gl.minimum(start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC)), end - 1)
            acc = acc * gl.load(topk_weights + gl.load(order + position)).to(gl.float32)[None, :]
        rows = gl.minimum(slots(first, second, T, gl.SliceLayout(1, ACC)), N - 1)
        acc = finish(acc, row_scale, bias, expert * N + rows, ROW_SCALE, HAS_BIAS)
        if APART:
            both = in_order(acc, T, BLOCK_M).reshape([2, OUT, BLOCK_M]).permute([1, 2, 0])
            gate, up = gl.convert_layout(
                both, gl.BlockedLayout([2, 1, 2], [16, 2, 1], [1, WARPS, 1], [2, 0, 1])
            ).split()
            out = activate(gate, up, alpha, beta, limit, KIND, GATED, HAS_LIMIT)
        elif GATED:
            gate, up = acc.reshape([T * 4, 2, 8, BLOCK_M]).permute([0, 2, 3, 1]).split()
            out = activate(gate, up, alpha, beta, limit, KIND, GATED, HAS_LIMIT).reshape([OUT, BLOCK_M])
        else:
            out = activate(acc, acc, alpha, beta, limit, KIND, GATED, HAS_LIMIT)
            out = in_order(out, T, BLOCK_M)
        STORE: gl.constexpr = store_layout(OUT, WARPS)
        out = gl.convert_layout(out.to(h.dtype.element_ty), STORE)
        n = block * OUT + gl.arange(0, OUT, gl.SliceLayout(1, STORE))
        position = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORE))
        gl.store(
            h + position.to(gl.int64)[None, :] * WIDTH + n[:, None],
            out,
            mask=(n < WIDTH)[:, None] & (position < end)[None, :],
        )


@gluon.jit(do_not_specialize=["TILES", "CHUNKS", "STEPS"])
def _second_kernel(
    shares, h, codes, scales, row_scale, bias, tile_experts, tile_starts, ends, order, topk_weights,
    N, K, TILES, CHUNKS, STEPS,
    SCALE: gl.constexpr, EVEN: gl.constexpr, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """shares[route, N] = routing weight * (w2[e] @ h[sorted route] + b2[e])."""
    WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = 1 if SCALE == "e8m0" else 2
    blocks = gl.cdiv(TILES, T)
    tile = gl.program_id(0) // blocks
    # The list of tiles is older than the kernel before this one, whose programs have all waited for it.
    expert = gl.load(tile_experts + tile).to(gl.int64)
    if expert >= 0:
        first = gl.program_id(0) % blocks * T
        xs, cs, ss = buffers(BLOCK_M, T, C, STAGES, WORDS)
        cp, sp = pointers(codes, scales, expert, first, first + T // 2, TILES, CHUNKS, T, C, WORDS)
        for s in gl.static_range(STAGES - 1):
            copy_weights(cs, ss, cp, sp, s, s, STEPS, CHUNKS, T, C, WORDS, EVEN)
        start = gl.load(tile_starts + tile)
        end = gl.load(ends + expert)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
        position = gl.minimum(start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TOKENS)), end - 1).to(gl.int64)
        acc = product(
            h, position, xs, cs, ss, cp, sp, STEPS, CHUNKS, K, SCALE, EVEN, BLOCK_M, T, C, STAGES, OVERLAP
        )
        ACC: gl.constexpr = accumulator(BLOCK_M, WARPS)
        rows = gl.minimum(slots(first, first + T // 2, T, gl.SliceLayout(1, ACC)), N - 1)
        acc = finish(acc, row_scale, bias, expert * N + rows, ROW_SCALE, HAS_BIAS)
        if not WEIGHT_ON_INPUT:
            position = gl.minimum(start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, ACC)), end - 1)
            acc = acc * gl.load(topk_weights + gl.load(order + position)).to(gl.float32)[None, :]
        STORE: gl.constexpr = store_layout(T * 64, WARPS)
        out = gl.convert_layout(in_order(acc.to(shares.dtype.element_ty), T, BLOCK_M), STORE)
        n = first * 64 + gl.arange(0, T * 64, gl.SliceLayout(1, STORE))
        position = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORE))
        route = gl.load(order + gl.minimum(position, end - 1)).to(gl.int64)
        gl.store(
            shares + route[None, :] * N + n[:, None], out, mask=(n < N)[:, None] & (position < end)[None, :]
        )
    elif PDL:
        gdc_wait()


def refuse(w13: Fragments, activation: Activation) -> bool:
    """Gates and ups that lie apart must both begin at a tile."""
    return activation.gated and not activation.interleaved and w13.shape[1] // 2 % ROWS != 0


def moe_cuts(tokens: int, experts: int, top_k: int) -> tuple[Cut, Cut]:
    """The choice for w13 and w2; both have the same block_m."""
    each = -(-tokens * top_k // min(experts, tokens * top_k))  # routes of an expert that is hit
    if each <= 2:
        return Cut(8, 2, 1, 8, 6), Cut(8, 2, 1, 8, 6)
    if each <= 8:
        return Cut(16, 2, 1, 8, 6), Cut(16, 2, 1, 8, 6)
    if each <= 20:
        return Cut(32, 2, 1, 8, 6), Cut(32, 2, 1, 8, 6)
    if each <= 40:
        return Cut(64, 2, 1, 8, 6, True), Cut(64, 2, 1, 8, 6, True)
    return Cut(128, 4, 1, 8, 6, True), Cut(128, 4, 1, 8, 6, True)


def first(
    x: Tensor,
    weights: Tensor,
    w: Fragments,
    bias: Tensor | None,
    activation: Activation,
    table: Table,
    cut: Cut,
    weight_on_input: bool,
    pdl: bool,
) -> Tensor:
    """[M, H] -> [routes, I] in the table's order."""
    _, rows, hidden = w.shape
    inner = rows // 2 if activation.gated else rows
    h = torch.empty(weights.numel(), inner, dtype=x.dtype, device=x.device)
    per_block = cut.tiles * (32 if activation.gated else 64)
    _first_kernel[(table.count * -(-inner // per_block),)](
        h, aligned(x), w.codes, w.scales, w.row_scale, bias,
        table.tile_experts, table.tile_starts, table.ends, table.order, weights,
        weights.shape[1], rows, inner, hidden, *cut.sizes(w),
        activation.alpha, activation.beta, activation.limit or 0.0,
        HAS_BIAS=bias is not None,
        KIND=activation.kind,
        GATED=activation.gated,
        INTERLEAVED=activation.interleaved,
        HAS_LIMIT=activation.limit is not None,
        WEIGHT_ON_INPUT=weight_on_input,
        PDL=pdl,
        launch_pdl=pdl,
        **cut.constants(w),
    )  # fmt: skip
    return h


def second(
    h: Tensor,
    weights: Tensor,
    w: Fragments,
    bias: Tensor | None,
    table: Table,
    cut: Cut,
    weight_on_input: bool,
    pdl: bool,
) -> Tensor:
    """[routes, I] in the table's order -> float32 [routes, N] in the tokens' order."""
    _, n, inner = w.shape
    shares = torch.empty(weights.numel(), n, dtype=torch.float32, device=h.device)
    _second_kernel[(table.count * -(-w.tiles // cut.tiles),)](
        shares, h, w.codes, w.scales, w.row_scale, bias,
        table.tile_experts, table.tile_starts, table.ends, table.order, weights, n, inner, *cut.sizes(w),
        HAS_BIAS=bias is not None,
        WEIGHT_ON_INPUT=weight_on_input,
        PDL=pdl,
        launch_pdl=pdl,
        **cut.constants(w),
    )  # fmt: skip
    return shares


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Fragments,
    w2: Fragments,
    activation: Activation,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    weight_on_input: bool,
    cuts: tuple[Cut, Cut] | None = None,
    pdl: bool = True,
) -> Tensor:
    """As `moe.moe`, x bfloat16. From the routing on, a kernel starts while the one before it ends."""
    (m, top_k), experts = topk_ids.shape, w13.shape[0]
    cut13, cut2 = cuts or moe_cuts(m, experts, top_k)
    weights = topk_weights.contiguous()
    with tiles.on(x.device):
        table = route(topk_ids, expert_map, experts, cut13.block_m, pdl)
        h = first(x, weights, w13, b13, activation, table, cut13, weight_on_input, pdl)
        shares = second(h, weights, w2, b2, table, cut2, weight_on_input, pdl)
        return total(shares, table.keys, m, experts, x.dtype, pdl)
