"""The experts on Hopper in Gluon: w13 with its activation is one kernel, w2 with the routing weight another; see
`hopper`.

Each kernel may start while the one before it ends, and waits for it. A single token needs no routing: each of its
routes is a tile.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.activations import Activation
from microscale.backends.triton import hopper_bulk, hopper_few, tiles
from microscale.backends.triton.cuts import Cut
from microscale.backends.triton.fragments import ROWS, Fragments
from microscale.backends.triton.hopper import PARTS, read_as
from microscale.backends.triton.hopper_bulk import half_of, main_of, rest_of
from microscale.backends.triton.hopper_decode import accumulator, applied, factors, slots
from microscale.backends.triton.hopper_few import few_places
from microscale.backends.triton.hopper_loop import buffers, copy_weights, pointers, product
from microscale.backends.triton.hopper_results import activated, routes_at, routes_of, span, weighted
from microscale.backends.triton.hopper_routes import expert_of, only_route, weight_of
from microscale.backends.triton.routing import Table


@gluon.jit
def _first(
    h, x, codes, scales, ratios, row_scale, bias, order, topk_weights, held, at, expert, block,
    first, second, start, end, top_k, N, WIDTH, K, TILES, CHUNKS, STEPS, alpha, beta, limit,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, EVEN: gl.constexpr, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr,
    KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, DIRECT: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, ODD: gl.constexpr, PARTS: gl.constexpr, BULK: gl.constexpr,
    FEW: gl.constexpr, ROOM: gl.constexpr,
):  # fmt: skip
    """A tile of `_first_kernel`, of at most BLOCK_M tokens."""
    MAIN: gl.constexpr = main_of(BLOCK_M) if BULK else BLOCK_M
    # Of a few tokens, what comes to the sums is asked for before them, unless something else comes first.
    EARLY: gl.constexpr = FEW > 0 and not WEIGHT_ON_INPUT
    LATE_SCALE: gl.constexpr = ROW_SCALE and not EARLY
    LATE_BIAS: gl.constexpr = HAS_BIAS and not EARLY
    out = (row_scale, bias, order, topk_weights, expert, block, first, second)
    sizes = (N, WIDTH, alpha, beta, limit)
    if BULK:  # x is in the order of the routes
        accs = hopper_bulk.product(
            x, start, codes, scales, ratios, expert, first, second, TILES, STEPS, CHUNKS,
            ELEMENT, SCALE, BLOCK_M, T, C, STAGES, ODD, BULK,
        )  # fmt: skip
    elif FEW:
        PLACES: gl.constexpr = few_places(gl.num_warps())
        i = start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, PLACES))
        place = gl.minimum(i, end - 1)
        # A direct tile is of the only token.
        token = (place * 0 if DIRECT else gl.load(order + place) // top_k).to(gl.int64)
        ROWS_AT: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_M, gl.num_warps()))
        rows = expert * N + gl.minimum(slots(first, second, T, ROWS_AT), N - 1)
        late = factors(row_scale, bias, rows, ROW_SCALE and EARLY, HAS_BIAS and EARLY)
        sums = hopper_few.product(
            x[0], token, i < end, at, held, K, ELEMENT, SCALE, FEW, ROOM, BLOCK_M, T, C, STAGES
        )
        accs = (applied(sums, late, ROW_SCALE and EARLY, HAS_BIAS and EARLY),)
    else:
        TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [gl.num_warps(), 1], [1, 0])
        place = gl.minimum(start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TOKENS)), end - 1)
        token = (routes_at(order, place, DIRECT) // top_k).to(gl.int64)
        sums = product(
            x[0], token, None, held, at, ratios, expert, first, second, TILES, STEPS, CHUNKS, K,
            ELEMENT, SCALE, EVEN, BLOCK_M, T, C, STAGES, OVERLAP, ODD, PARTS,
        )  # fmt: skip
        accs = (sums,)
    activated(
        h, accs[0], *out, start, end, *sizes, LATE_SCALE, LATE_BIAS,
        KIND, GATED, INTERLEAVED, HAS_LIMIT, WEIGHT_ON_INPUT, DIRECT, MAIN, T,
    )  # fmt: skip
    if BULK and rest_of(BLOCK_M):
        activated(
            h, accs[1], *out, start + MAIN, end, *sizes, ROW_SCALE, HAS_BIAS,
            KIND, GATED, INTERLEAVED, HAS_LIMIT, WEIGHT_ON_INPUT, DIRECT, rest_of(BLOCK_M), T,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["top_k", "TILES", "CHUNKS", "STEPS", "experts", "known"])
def _first_kernel(
    h, x, x_half, x_rest, codes, scales, ratios, row_scale, bias, tile_experts, tile_starts, ends, order, expert_map,
    topk_weights, top_k, experts, known, N, WIDTH, K, TILES, CHUNKS, STEPS, alpha, beta, limit,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, EVEN: gl.constexpr, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr,
    KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, HAS_LIMIT: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, DIRECT: gl.constexpr, HAS_MAP: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, ODD: gl.constexpr, PARTS: gl.constexpr, BULK: gl.constexpr,
    FEW: gl.constexpr, ROOM: gl.constexpr, TAIL: gl.constexpr, PDL: gl.constexpr, LOGITS: gl.constexpr,
):  # fmt: skip
    """h[sorted route, WIDTH] = activation(w13[e] @ x[token] + b13[e])."""
    blocks = gl.cdiv(WIDTH, T * 32 if GATED else T * 64)
    tile = gl.program_id(0) // blocks
    block = gl.program_id(0) % blocks
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = expert_of(tile, tile_experts, expert_map, experts, known, DIRECT, HAS_MAP, LOGITS)
    if expert >= 0:
        if GATED and not INTERLEAVED:  # half the tiles are gates, half the ups WIDTH rows on
            first = block * (T // 2)
            second = first + WIDTH // 64
        else:
            first = block * T
            second = first + T // 2
        held, at = codes, codes
        if FEW:
            at = hopper_few.pointers(codes, scales, expert, first, second, TILES, FEW, T, C, ELEMENT, SCALE)
            held = hopper_few.ahead(at, FEW, C, STAGES, ELEMENT, SCALE)
        elif not BULK:
            held = buffers(T, C, STAGES, ELEMENT, SCALE)
            at = pointers(codes, scales, expert, first, second, TILES, CHUNKS, T, C, ELEMENT, SCALE)
            for s in gl.static_range(STAGES - 1):
                copy_weights(held, at, s, s, STEPS, CHUNKS, T, C, ELEMENT, SCALE, EVEN)
        start, end = span(tile, expert, tile_starts, ends, DIRECT)
        if TAIL and end - start <= half_of(BLOCK_M):
            _first(
                h, (x_half, x_half), codes, scales, ratios, row_scale, bias, order, topk_weights, held, at, expert,
                block, first, second, start, end, top_k, N, WIDTH, K, TILES, CHUNKS, STEPS, alpha, beta, limit,
                ELEMENT, SCALE, EVEN, ROW_SCALE, HAS_BIAS, KIND, GATED, INTERLEAVED, HAS_LIMIT, WEIGHT_ON_INPUT, DIRECT,
                half_of(BLOCK_M), T, C, STAGES, OVERLAP, ODD, PARTS, BULK, FEW, ROOM,
            )  # fmt: skip
        else:
            _first(
                h, (x, x_rest), codes, scales, ratios, row_scale, bias, order, topk_weights, held, at, expert, block,
                first, second, start, end, top_k, N, WIDTH, K, TILES, CHUNKS, STEPS, alpha, beta, limit,
                ELEMENT, SCALE, EVEN, ROW_SCALE, HAS_BIAS, KIND, GATED, INTERLEAVED, HAS_LIMIT, WEIGHT_ON_INPUT, DIRECT,
                BLOCK_M, T, C, STAGES, OVERLAP, ODD, PARTS, BULK, FEW, ROOM,
            )  # fmt: skip


@gluon.jit
def _second(
    shares, h, codes, scales, ratios, row_scale, bias, order, topk_weights, held, at, expert, first, start, end,
    N, K, TILES, CHUNKS, STEPS,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, EVEN: gl.constexpr, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, DIRECT: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, ODD: gl.constexpr, PARTS: gl.constexpr, BULK: gl.constexpr,
    FEW: gl.constexpr, ROOM: gl.constexpr, LOGITS: gl.constexpr,
):  # fmt: skip
    """A tile of `_second_kernel`, of at most BLOCK_M tokens."""
    MAIN: gl.constexpr = main_of(BLOCK_M) if BULK else BLOCK_M
    REST: gl.constexpr = rest_of(BLOCK_M) if BULK else 0
    EARLY: gl.constexpr = FEW > 0
    LATE_SCALE: gl.constexpr = ROW_SCALE and not EARLY
    LATE_BIAS: gl.constexpr = HAS_BIAS and not EARLY
    if LOGITS:
        routes = only_route(start, topk_weights, MAIN, T)
    else:
        routes = routes_of(order, topk_weights, start, end, WEIGHT_ON_INPUT, DIRECT, MAIN, T, EARLY)
    more = routes
    if REST:
        more = routes_of(order, topk_weights, start + MAIN, end, WEIGHT_ON_INPUT, DIRECT, REST, T, EARLY)
    if BULK:
        accs = hopper_bulk.product(
            h, start, codes, scales, ratios, expert, first, first + T // 2, TILES, STEPS, CHUNKS,
            ELEMENT, SCALE, BLOCK_M, T, C, STAGES, ODD, BULK,
        )  # fmt: skip
    elif FEW:
        PLACES: gl.constexpr = few_places(gl.num_warps())
        i = start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, PLACES))
        ROWS_AT: gl.constexpr = gl.SliceLayout(1, accumulator(BLOCK_M, gl.num_warps()))
        n = expert * N + gl.minimum(slots(first, first + T // 2, T, ROWS_AT), N - 1)
        late = factors(row_scale, bias, n, ROW_SCALE, HAS_BIAS)
        place = gl.minimum(i, end - 1).to(gl.int64)
        sums = hopper_few.product(
            h[0], place, i < end, at, held, K, ELEMENT, SCALE, FEW, ROOM, BLOCK_M, T, C, STAGES
        )
        accs = (applied(sums, late, ROW_SCALE, HAS_BIAS),)
    else:
        TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [gl.num_warps(), 1], [1, 0])
        rows = gl.minimum(start + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TOKENS)), end - 1).to(gl.int64)
        sums = product(
            h[0], rows, None, held, at, ratios, expert, first, first + T // 2, TILES, STEPS, CHUNKS, K,
            ELEMENT, SCALE, EVEN, BLOCK_M, T, C, STAGES, OVERLAP, ODD, PARTS,
        )  # fmt: skip
        accs = (sums,)
    weighted(
        shares, accs[0], row_scale, bias, routes, expert, first, start, end, N,
        LATE_SCALE, LATE_BIAS, WEIGHT_ON_INPUT, DIRECT, MAIN, T, EARLY,
    )  # fmt: skip
    if REST:
        weighted(
            shares, accs[1], row_scale, bias, more, expert, first, start + MAIN, end, N,
            ROW_SCALE, HAS_BIAS, WEIGHT_ON_INPUT, DIRECT, REST, T, EARLY,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["TILES", "CHUNKS", "STEPS", "experts", "known"])
def _second_kernel(
    shares, h, h_half, h_rest, codes, scales, ratios, row_scale, bias, tile_experts, tile_starts, ends, order,
    expert_map, topk_weights, experts, known, N, K, TILES, CHUNKS, STEPS,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, EVEN: gl.constexpr, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr,
    WEIGHT_ON_INPUT: gl.constexpr, DIRECT: gl.constexpr, HAS_MAP: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, ODD: gl.constexpr, PARTS: gl.constexpr, BULK: gl.constexpr,
    FEW: gl.constexpr, ROOM: gl.constexpr, TAIL: gl.constexpr, PDL: gl.constexpr, LOGITS: gl.constexpr,
    TOP_K: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """shares[route, N] = routing weight * (w2[e] @ h[sorted route] + b2[e])."""
    blocks = gl.cdiv(TILES, T)
    tile = gl.program_id(0) // blocks
    # The list of tiles, or the ids, are older than the kernel before this one, whose programs have waited for them.
    expert = expert_of(tile, tile_experts, expert_map, experts, known, DIRECT, HAS_MAP, LOGITS)
    if expert >= 0:
        first = gl.program_id(0) % blocks * T
        held, at = codes, codes
        if FEW:
            second = first + T // 2
            at = hopper_few.pointers(codes, scales, expert, first, second, TILES, FEW, T, C, ELEMENT, SCALE)
            held = hopper_few.ahead(at, FEW, C, STAGES, ELEMENT, SCALE)
        elif not BULK:
            held = buffers(T, C, STAGES, ELEMENT, SCALE)
            at = pointers(codes, scales, expert, first, first + T // 2, TILES, CHUNKS, T, C, ELEMENT, SCALE)
            for s in gl.static_range(STAGES - 1):
                copy_weights(held, at, s, s, STEPS, CHUNKS, T, C, ELEMENT, SCALE, EVEN)
        given = topk_weights
        if LOGITS:
            given = weight_of(tile, tile_experts, topk_weights, experts, TOP_K, SLOTS, LOGITS)
        start, end = span(tile, expert, tile_starts, ends, DIRECT)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        if TAIL and end - start <= half_of(BLOCK_M):
            _second(
                shares, (h_half, h_half), codes, scales, ratios, row_scale, bias, order, given, held, at,
                expert, first, start, end, N, K, TILES, CHUNKS, STEPS,
                ELEMENT, SCALE, EVEN, ROW_SCALE, HAS_BIAS, WEIGHT_ON_INPUT, DIRECT,
                half_of(BLOCK_M), T, C, STAGES, OVERLAP, ODD, PARTS, BULK, FEW, ROOM, LOGITS,
            )  # fmt: skip
        else:
            _second(
                shares, (h, h_rest), codes, scales, ratios, row_scale, bias, order, given, held, at,
                expert, first, start, end, N, K, TILES, CHUNKS, STEPS,
                ELEMENT, SCALE, EVEN, ROW_SCALE, HAS_BIAS, WEIGHT_ON_INPUT, DIRECT,
                BLOCK_M, T, C, STAGES, OVERLAP, ODD, PARTS, BULK, FEW, ROOM, LOGITS,
            )  # fmt: skip
    elif PDL:
        gdc_wait()


def refuse(w13: Fragments, activation: Activation) -> bool:
    """Gates and ups that lie apart must both begin at a tile."""
    return activation.apart and w13.shape[1] // 2 % ROWS != 0


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
    expert_map: Tensor | None = None,
    direct: bool = False,
    logits: int = 0,
) -> Tensor:
    """[M, H] -> [routes, I] in the table's order.

    Args:
        x: for a cut with `bulk` [routes, H] in that order.
        direct: there is one token, and the table's `tile_experts` are its ids; or, with `logits`, so many logits.
    """
    experts, rows, hidden = w.shape
    inner = rows // 2 if activation.gated else rows
    h = torch.empty(weights.numel(), inner, dtype=x.dtype, device=x.device)
    programs = table.count * -(-inner // (cut.tiles * (32 if activation.gated else 64)))
    cut = cut.spread(programs, tiles.target(x.device).units)
    _first_kernel[(programs,)](
        h, *read_as(x, cut), w.codes, w.scales, w.ratios, w.row_scale, bias,
        table.tile_experts, table.tile_starts, table.ends, table.order, expert_map, weights,
        weights.shape[1], experts, experts if expert_map is None else expert_map.numel(),
        rows, inner, hidden, *cut.sizes(w),
        activation.alpha, activation.beta, activation.limit or 0.0,
        HAS_BIAS=bias is not None,
        KIND=activation.kind,
        GATED=activation.gated,
        INTERLEAVED=activation.interleaved,
        HAS_LIMIT=activation.limit is not None,
        WEIGHT_ON_INPUT=weight_on_input,
        DIRECT=direct,
        HAS_MAP=expert_map is not None,
        PARTS=PARTS[x.dtype],
        FEW=w.chunks if cut.few else 0,
        ROOM=cut.room(w.shape[-1]) if cut.few else 0,
        # A direct tile is one route: the compiler would decide the branch, and Triton 3.6 cannot compile a decided
        # branch between two sizes of tile ("PassManager::run failed", in ConvertTritonGPUToLLVM).
        TAIL=cut.tail and not direct,
        PDL=pdl,
        LOGITS=logits,
        **cut.constants(w),
        **tiles.launch(pdl),
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
    expert_map: Tensor | None = None,
    direct: bool = False,
    logits: int = 0,
) -> Tensor:
    """[routes, I] in the table's order -> [routes, N] in the tokens' order, in h's dtype."""
    experts, n, inner = w.shape
    shares = torch.empty(weights.numel(), n, dtype=h.dtype, device=h.device)
    programs = table.count * -(-w.tiles // cut.tiles)
    cut = cut.spread(programs, tiles.target(h.device).units)
    _second_kernel[(programs,)](
        shares, *read_as(h, cut), w.codes, w.scales, w.ratios, w.row_scale, bias,
        table.tile_experts, table.tile_starts, table.ends, table.order, expert_map, weights,
        experts, experts if expert_map is None else expert_map.numel(), n, inner, *cut.sizes(w),
        HAS_BIAS=bias is not None,
        WEIGHT_ON_INPUT=weight_on_input,
        DIRECT=direct,
        HAS_MAP=expert_map is not None,
        PARTS=PARTS[h.dtype],
        FEW=w.chunks if cut.few else 0,
        ROOM=cut.room(w.shape[-1]) if cut.few else 0,
        TAIL=cut.tail and not direct,  # as in `first`
        PDL=pdl,
        LOGITS=logits,
        TOP_K=weights.shape[1] if logits else 0,
        SLOTS=triton.next_power_of_2(weights.shape[1]) if logits else 0,
        **cut.constants(w),
        **tiles.launch(pdl),
    )  # fmt: skip
    return shares
