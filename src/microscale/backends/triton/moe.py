"""Experts: routes are sorted by expert on the device, w13 with its activation is one kernel, w2 with the routing
weight another, and a third adds up each token's shares in the order of its slots. No atomics, so runs are equal to
the bit; no waiting for the device, so CUDA graphs can capture it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.triton import tiles
from microscale.backends.triton.activation import activate
from microscale.backends.triton.blocks import Blocks
from microscale.backends.triton.gemm import product, scaled
from microscale.backends.triton.layout import Packed
from microscale.backends.triton.rounded import Rows, rows_of
from microscale.backends.triton.routing import route
from microscale.backends.triton.total import total
from microscale.formats import Format


@triton.jit
def _first_kernel(
    h,
    x,
    x_scales,
    x_row_scale,
    codes,
    scales,
    row_scale,
    bias,
    tile_experts,
    tile_starts,
    ends,
    order,
    topk_weights,
    top_k,
    N,
    K,
    GROUPS: tl.constexpr,
    scale_rows,
    alpha,
    beta,
    limit,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    SPECIALS: tl.constexpr,
    SCALE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACT: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h[sorted route, I] = activation(w13[e] @ x[token] + b13[e])."""
    # Of a gated tile's rows the first half are gates and the second the ups beside them.
    OUT: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    width = N // 2 if GATED else N  # I
    blocks = tl.cdiv(width, OUT)
    tile = tl.program_id(0) // blocks
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    start = tl.load(tile_starts + tile)
    position = start + tl.arange(0, BLOCK_M)
    end = tl.load(ends + expert)
    mask_m = position < end
    route = tl.load(order + tl.minimum(position, end - 1)).to(tl.int64)
    first = tl.program_id(0) % blocks * OUT
    i = tl.arange(0, BLOCK_N)
    within = tl.minimum(first + i % OUT, width - 1)
    if INTERLEAVED:
        rows = 2 * within + i // OUT
    else:
        rows = within + i // OUT * width
    acc = product(
        x, x_scales, x_row_scale, route // top_k, codes, scales, expert, rows, N, K, GROUPS, scale_rows,
        BITS, MANTISSA, BIAS, SPECIALS, SCALE, HEIGHT, WIDTH, UNIT, CHUNK, IN_TILE, EVEN_K, ACT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if WEIGHT_ON_INPUT:
        # On the sum instead of on x: the same number with one rounding less.
        acc = acc * tl.load(topk_weights + route).to(tl.float32)[None, :]
    acc = scaled(acc, row_scale, bias, expert * N + rows, ROW_SCALE, HAS_BIAS)
    if GATED:
        gate, up = acc.reshape(2, OUT, BLOCK_M).permute(1, 2, 0).split()
    else:
        gate, up = acc, acc
    out = activate(gate, up, alpha, beta, limit, KIND, GATED, HAS_LIMIT)
    n = first + tl.arange(0, OUT)
    pointers = h + position.to(tl.int64)[None, :] * width + n[:, None]
    tl.store(pointers, out.to(h.dtype.element_ty), mask=(n < width)[:, None] & mask_m[None, :])


@triton.jit
def _second_kernel(
    shares,
    h,
    h_scales,
    h_row_scale,
    codes,
    scales,
    row_scale,
    bias,
    tile_experts,
    tile_starts,
    ends,
    order,
    topk_weights,
    N,
    K,
    GROUPS: tl.constexpr,
    scale_rows,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    BIAS: tl.constexpr,
    SPECIALS: tl.constexpr,
    SCALE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    IN_TILE: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACT: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """shares[route, N] = routing weight * (w2[e] @ h[sorted route] + b2[e]), float32."""
    blocks = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // blocks
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    position = tl.load(tile_starts + tile) + tl.arange(0, BLOCK_M)
    end = tl.load(ends + expert)
    mask_m = position < end
    position = tl.minimum(position, end - 1)
    route = tl.load(order + position).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1)
    acc = product(
        h, h_scales, h_row_scale, position.to(tl.int64), codes, scales, expert, rows, N, K, GROUPS, scale_rows,
        BITS, MANTISSA, BIAS, SPECIALS, SCALE, HEIGHT, WIDTH, UNIT, CHUNK, IN_TILE, EVEN_K, ACT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc = scaled(acc, row_scale, bias, expert * N + rows, ROW_SCALE, HAS_BIAS)
    if not WEIGHT_ON_INPUT:
        acc = acc * tl.load(topk_weights + route).to(tl.float32)[None, :]
    tl.store(shares + route[None, :] * N + n[:, None], acc, mask=(n < N)[:, None] & mask_m[None, :])


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Packed | Blocks,
    w2: Packed | Blocks,
    activation: Activation,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    weight_on_input: bool,
    add_up: bool = True,
    act: Format | None = None,
) -> Tensor:
    """[M, H] -> [M, N] in x's dtype; every extent at least 1. Without `add_up` it is [M * T, N], what is added up.

    Numerics: the intermediate is rounded once, to x's dtype or, as x is, from float32 to `act`. What
    `operands.local_ids` raises for an id out of range would wait for the device; here such a token becomes NaN.
    """
    (m, top_k), device, dtype = topk_ids.shape, x.device, x.dtype
    experts, rows, hidden = w13.shape
    n, routes = w2.shape[1], m * top_k
    if act is not None and weight_on_input:  # a token has one route, and is rounded with its weight
        x = x.float() * topk_weights
    a = rows_of(x, act, isinstance(w13, Blocks))
    eight, each = act is not None and act.scale == "f32", -(-routes // min(experts, routes))
    tile13, tile2 = (tiles.choose(w, a.dtype, each, device, eight) for w in (w13, w2))
    block_m = min(tile13.block_m, tile2.block_m)
    tile13, tile2 = tile13.with_block_m(block_m), tile2.with_block_m(block_m)
    weights, wide = topk_weights.contiguous(), dtype if act is None else torch.float32
    h = torch.empty(routes, w2.shape[2], dtype=tiles.stored_dtype(wide), device=device)
    shares = torch.empty(routes, n, dtype=torch.float32, device=device)
    routed = route(topk_ids, expert_map, experts, block_m)
    table = (routed.tile_experts, routed.tile_starts, routed.ends, routed.order, weights)
    with tiles.on(device):
        out = rows // 2 if activation.gated else rows
        per_tile = tile13.block_n // 2 if activation.gated else tile13.block_n
        _first_kernel[(routed.count * -(-out // per_tile),)](
            h, a.x, a.scales, a.row_scale, w13.codes, w13.scales, w13.row_scale, b13, *table, top_k, rows, hidden,
            w13.groups, w13.scales.shape[-1], activation.alpha, activation.beta, activation.limit or 0.0,
            **w13.constants(a.dtype),
            ACT=a.blocks,
            ROW_SCALE=w13.row_scale is not None,
            HAS_BIAS=b13 is not None,
            KIND=activation.kind,
            GATED=activation.gated,
            INTERLEAVED=activation.interleaved,
            HAS_LIMIT=activation.limit is not None,
            WEIGHT_ON_INPUT=weight_on_input and act is None,
            **tile13.constants,
            **tile13.compiler,
        )  # fmt: skip
        a = Rows(h, None, dtype) if act is None else rows_of(h, act, isinstance(w2, Blocks))
        _second_kernel[(routed.count * -(-n // tile2.block_n),)](
            shares, a.x, a.scales, a.row_scale, w2.codes, w2.scales, w2.row_scale, b2, *table, n, w2.shape[2],
            w2.groups, w2.scales.shape[-1],
            **w2.constants(a.dtype),
            ACT=a.blocks,
            ROW_SCALE=w2.row_scale is not None,
            HAS_BIAS=b2 is not None,
            WEIGHT_ON_INPUT=weight_on_input,
            **tile2.constants,
            **tile2.compiler,
        )  # fmt: skip
    if not add_up:
        return shares
    return total(shares, topk_ids, expert_map, experts, tiles.stored_dtype(dtype)).to(dtype)
