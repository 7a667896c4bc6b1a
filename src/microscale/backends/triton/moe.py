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
from microscale.backends.triton.gemm import product, scaled
from microscale.backends.triton.layout import Packed


@triton.jit(do_not_specialize=["routes"])
def _keys_kernel(keys, ids, expert_map, routes, experts, known, HAS_MAP: tl.constexpr, BLOCK: tl.constexpr):
    """Global ids -> what routes are sorted by: the local expert, E for none, E + 1 for an id that does not exist."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(ids + i, mask=i < routes, other=-1).to(tl.int64)
    inside = (e >= 0) & (e < known)
    if HAS_MAP:
        local = tl.load(expert_map + e, mask=inside, other=-1).to(tl.int64)
    else:
        local = e
    key = tl.where((e == -1) | (inside & (local == -1)), experts, experts + 1)
    key = tl.where(inside & (local >= 0) & (local < experts), local, key)
    tl.store(keys + i, key.to(tl.int32), mask=i < routes)


@triton.jit(do_not_specialize=["tiles"])
def _tiles_kernel(
    tile_experts, tile_starts, starts, experts, tiles, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Cuts each expert's routes into tiles of BLOCK_M: tile -> (expert, its first sorted route); expert -1: no tile."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(starts + e, mask=e < experts, other=0)
    count = tl.load(starts + e + 1, mask=e < experts, other=0) - start
    end = tl.cumsum((count + BLOCK_M - 1) // BLOCK_M, 0)  # tiles up to and with expert e
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = end[None, :] <= t[:, None]  # [BLOCK, BLOCK_E]: experts that are done
    expert = tl.sum(before.to(tl.int32), 1)
    here = e[None, :] == expert[:, None]
    first = tl.max(tl.where(before, end[None, :], 0), 1)
    row = tl.sum(tl.where(here, start[None, :], 0), 1) + (t - first) * BLOCK_M
    # Experts past E have no routes, so a tile that is theirs is behind the last one.
    tl.store(tile_experts + t, tl.where(expert < experts, expert, -1), mask=t < tiles)
    tl.store(tile_starts + t, row, mask=t < tiles)


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _tanh(v):
    """Within a few units of the last place everywhere: near 0 by its series, since 1 - exp(-2 |v|) cancels there."""
    s = v * v
    series = 0.021869488536155203 - 0.008863235529902197 * s
    series = -0.05396825396825397 + s * series
    series = 0.13333333333333333 + s * series
    series = -0.3333333333333333 + s * series
    small = v + v * s * series
    e = tl.exp(-2.0 * tl.abs(v))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(v) < 0.35, small, tl.where(v < 0, -large, large))


@triton.jit
def activate(gate, up, alpha, beta, limit, KIND: tl.constexpr, GATED: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """The formulas of `activations`, float32. Comparisons keep a NaN, where minimum and maximum would drop it."""
    if HAS_LIMIT:
        if GATED:
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        if KIND != "swiglu_step":
            gate = tl.where(gate > limit, limit, gate)
    if KIND == "silu":
        h = gate / (1.0 + tl.exp(-gate))
    elif KIND == "swiglu_oai":
        h = gate * _sigmoid(alpha * gate)
        up = up + beta
    elif KIND == "swiglu_step":
        h = gate / (1.0 + tl.exp(-gate))
        if HAS_LIMIT:
            h = tl.where(h > limit, limit, h)
    elif KIND == "situ":
        h = beta * _tanh(gate / beta) * _sigmoid(gate)
        up = alpha * _tanh(up / alpha)
    elif KIND == "relu2":
        h = tl.where(gate < 0, 0.0, gate)
        h = h * h
    elif KIND == "gelu_tanh":
        # 1 + tanh(z) = 2 sigmoid(2 z), without its cancellation
        h = gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        h = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return h * up if GATED else h


@triton.jit(do_not_specialize=["routes"])
def _first_kernel(
    h,
    x,
    codes,
    scales,
    row_scale,
    bias,
    tile_experts,
    tile_starts,
    starts,
    order,
    topk_weights,
    top_k,
    routes,
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
    mask_m = position < tl.load(starts + expert + 1)
    route = tl.load(order + tl.minimum(position, routes - 1))
    first = tl.program_id(0) % blocks * OUT
    i = tl.arange(0, BLOCK_N)
    within = tl.minimum(first + i % OUT, width - 1)
    if INTERLEAVED:
        rows = 2 * within + i // OUT
    else:
        rows = within + i // OUT * width
    acc = product(
        x, route // top_k, codes, scales, expert, rows, N, K, GROUPS, scale_rows,
        BITS, MANTISSA, BIAS, SPECIALS, SCALE, HEIGHT, WIDTH, UNIT, CHUNK, IN_TILE, EVEN_K, BLOCK_M, BLOCK_N,
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


@triton.jit(do_not_specialize=["routes"])
def _second_kernel(
    shares,
    h,
    codes,
    scales,
    row_scale,
    bias,
    tile_experts,
    tile_starts,
    starts,
    order,
    topk_weights,
    routes,
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
    mask_m = position < tl.load(starts + expert + 1)
    position = tl.minimum(position, routes - 1)
    route = tl.load(order + position)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(n, N - 1)
    acc = product(
        h, position.to(tl.int64), codes, scales, expert, rows, N, K, GROUPS, scale_rows,
        BITS, MANTISSA, BIAS, SPECIALS, SCALE, HEIGHT, WIDTH, UNIT, CHUNK, IN_TILE, EVEN_K, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc = scaled(acc, row_scale, bias, expert * N + rows, ROW_SCALE, HAS_BIAS)
    if not WEIGHT_ON_INPUT:
        acc = acc * tl.load(topk_weights + route).to(tl.float32)[None, :]
    tl.store(shares + route[None, :] * N + n[:, None], acc, mask=(n < N)[:, None] & mask_m[None, :])


@triton.jit
def _sum_kernel(y, shares, keys, experts, TOP_K: tl.constexpr, N, BLOCK: tl.constexpr):
    """y[token] = the sum of its shares in the order of its slots; NaN where one of its ids does not exist."""
    blocks = tl.cdiv(N, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for t in range(TOP_K):
        route = token * TOP_K + t
        key = tl.load(keys + route)
        # A share that nobody wrote is not read.
        acc += tl.load(shares + route * N + n, mask=(n < N) & (key < experts), other=0.0)
        acc = tl.where(key > experts, float("nan"), acc)
    tl.store(y + token * N + n, acc.to(y.dtype.element_ty), mask=n < N)


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Packed,
    w2: Packed,
    activation: Activation,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    weight_on_input: bool,
) -> Tensor:
    """[M, H] -> [M, N] in x's dtype; every extent at least 1.

    Numerics: the intermediate is rounded once to x's dtype. What `operands.local_ids` raises for an id out of range
    would wait for the device; here such a token becomes NaN.
    """
    (m, top_k), device = topk_ids.shape, x.device
    experts, rows, hidden = w13.shape
    n, routes = w2.shape[1], m * top_k
    tile13, tile2 = (tiles.choose(w, x.dtype, -(-routes // min(experts, routes)), device) for w in (w13, w2))
    block_m = min(tile13.block_m, tile2.block_m)
    tile13, tile2 = tile13.with_block_m(block_m), tile2.with_block_m(block_m)
    # Each expert's last tile may be partly empty: room for the worst case, as the counts stay on the device.
    count = min(routes, (routes + min(experts, routes) * (block_m - 1)) // block_m)
    a, stored = tiles.as_stored(x), tiles.stored_dtype(x.dtype)
    weights = topk_weights.contiguous()
    keys = torch.empty(routes, dtype=torch.int32, device=device)
    tile_experts, tile_starts = torch.empty(2, count, dtype=torch.int32, device=device).unbind()
    h = torch.empty(routes, w2.shape[2], dtype=stored, device=device)
    shares = torch.empty(routes, n, dtype=torch.float32, device=device)
    y = torch.empty(m, n, dtype=stored, device=device)
    with tiles.on(device):
        known = experts if expert_map is None else expert_map.numel()
        _keys_kernel[(-(-routes // 256),)](
            keys, topk_ids.contiguous(), expert_map, routes, experts, known, HAS_MAP=expert_map is not None, BLOCK=256
        )  # fmt: skip
        ordered, order = torch.sort(keys, stable=True)
        starts = torch.searchsorted(
            ordered, torch.arange(experts + 1, dtype=torch.int32, device=device), out_int32=True
        )
        _tiles_kernel[(-(-count // 64),)](
            tile_experts, tile_starts, starts, experts, count,
            BLOCK_M=block_m, BLOCK_E=triton.next_power_of_2(experts), BLOCK=64,
        )  # fmt: skip
        table = (tile_experts, tile_starts, starts, order, weights)
        out = rows // 2 if activation.gated else rows
        per_tile = tile13.block_n // 2 if activation.gated else tile13.block_n
        _first_kernel[(count * -(-out // per_tile),)](
            h, a, w13.codes, w13.scales, w13.row_scale, b13, *table, top_k, routes, rows, hidden,
            w13.groups, w13.scales.shape[-1], activation.alpha, activation.beta, activation.limit or 0.0,
            **w13.constants(x.dtype),
            ROW_SCALE=w13.row_scale is not None,
            HAS_BIAS=b13 is not None,
            KIND=activation.kind,
            GATED=activation.gated,
            INTERLEAVED=activation.interleaved,
            HAS_LIMIT=activation.limit is not None,
            WEIGHT_ON_INPUT=weight_on_input,
            **tile13.constants,
            **tile13.compiler,
        )  # fmt: skip
        _second_kernel[(count * -(-n // tile2.block_n),)](
            shares, h, w2.codes, w2.scales, w2.row_scale, b2, *table, routes, n, w2.shape[2],
            w2.groups, w2.scales.shape[-1],
            **w2.constants(x.dtype),
            ROW_SCALE=w2.row_scale is not None,
            HAS_BIAS=b2 is not None,
            WEIGHT_ON_INPUT=weight_on_input,
            **tile2.constants,
            **tile2.compiler,
        )  # fmt: skip
        _sum_kernel[(m * -(-n // 1024),)](y, shares, keys, experts, top_k, n, BLOCK=1024)
    return y.to(x.dtype)
