"""y = x W^T with packed weights: the loop over K that linear and MoE share, and linear's kernel.

Weights are the left operand, [rows, K] x [K, tokens]: they go from memory to the matrix unit through registers, and
any number of tokens takes the same instructions in the same order. K is walked from front to back in fixed steps by
one program. So a token's result does not depend, to the bit, on which or how many others there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microscale.backends.triton import decode, tiles
from microscale.backends.triton.blocks import Blocks
from microscale.backends.triton.layout import Packed
from microscale.backends.triton.rounded import rows_of
from microscale.formats import Format


@triton.jit
def product_of_codes(
    x,
    x_scales,
    tokens,
    codes,
    scales,
    expert,
    rows,
    N,
    GROUPS: tl.constexpr,
    scale_rows,
    HEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`product` of E4M3 codes on both sides: the matrix unit multiplies 128 columns, and their sum meets both scales in
    float32."""
    column = tl.arange(0, 128)
    x_columns = x + tokens[None, :] * (GROUPS * 128) + column[:, None]
    code_rows = codes + (expert * N + rows)[:, None] * (GROUPS * 128) + column[None, :]
    scale_columns = scales + expert * GROUPS * scale_rows + rows // HEIGHT
    x_scales += tokens * GROUPS
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    scale, x_scale = tl.load(scale_columns), tl.load(x_scales)
    for group in range(GROUPS):
        # The next scales are on their way while codes are multiplied; behind the last the last ones once more.
        then = tl.minimum(group + 1, GROUPS - 1)
        next_scale, next_x_scale = tl.load(scale_columns + then * scale_rows), tl.load(x_scales + then)
        w = tl.load(code_rows + group * 128).to(tl.float8e4nv, bitcast=True)
        a = tl.load(x_columns + group * 128).to(tl.float8e4nv, bitcast=True)
        acc = tl.fma(tl.dot(w, a), scale[:, None] * x_scale[None, :], acc)
        scale, x_scale = next_scale, next_x_scale
    return acc


@triton.jit
def product_of_blocks(
    x,
    x_scales,
    x_row_scale,
    tokens,
    codes,
    scales,
    expert,
    rows,
    N,
    GROUPS: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    WIDTH: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`product` of MX or NVFP4 codes on both sides: block-scaled units multiply 128 columns with their scales, see
    `blocks`."""
    WEIGHT: tl.constexpr = "e2m1" if BITS == 4 else ("e4m3" if MANTISSA == 3 else "e5m2")
    WIDE: tl.constexpr = 16 * BITS
    X_WIDE: tl.constexpr = 64 if ACT == "e2m1" else 128
    SCALES: tl.constexpr = 128 // WIDTH
    block = tl.arange(0, SCALES)[None, :]
    rows = expert * N + rows
    code_rows = codes + rows[:, None] * (GROUPS * WIDE) + tl.arange(0, WIDE)[None, :]  # [BLOCK_N, WIDE]
    x_columns = x + tokens[None, :] * (GROUPS * X_WIDE) + tl.arange(0, X_WIDE)[:, None]  # [X_WIDE, BLOCK_M]
    scale_rows = scales + rows[:, None] * (GROUPS * SCALES) + block  # [BLOCK_N, SCALES]
    x_scale_rows = x_scales + tokens[:, None] * (GROUPS * SCALES) + block  # [BLOCK_M, SCALES]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in range(GROUPS):
        w, a = tl.load(code_rows + group * WIDE), tl.load(x_columns + group * X_WIDE)
        scale, x_scale = tl.load(scale_rows + group * SCALES), tl.load(x_scale_rows + group * SCALES)
        if WIDTH == 16:  # NVFP4
            scale, x_scale = scale.to(tl.float8e4nv, bitcast=True), x_scale.to(tl.float8e4nv, bitcast=True)
        acc = tl.dot_scaled(w, scale, WEIGHT, a, x_scale, ACT, acc)
    if x_row_scale is not None:
        acc = acc * tl.load(x_row_scale + tokens)[None, :]
    return acc


@triton.jit
def product(
    x,
    x_scales,
    x_row_scale,
    tokens,
    codes,
    scales,
    expert,
    rows,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_M]: W[rows] @ x[tokens]^T, without the tensor scale.

    Two ways, both exact in the weights. IN_TILE: code times scale is a number of x's dtype, and the matrix unit gets
    that. Else it gets the bare codes, which every 16-bit dtype holds, one scale block at a time, and the block's sum
    is multiplied by the scale in float32: that takes any scale byte, and any float32 scale. Where x are FP8 codes, too,
    it is `product_of_codes`, and with ACT `product_of_blocks`.

    Args:
        x: [*, K]; tokens: int64 [BLOCK_M], rows of it.
        x_scales: None, or those of codes x, see `rounded.Rows`: float32 [*, GROUPS] of E4M3 codes [*, GROUPS * 128],
            and scale bytes of MX or NVFP4 codes, with elements ACT.
        x_row_scale: None, or of NVFP4 codes float32 [*], what else multiplies a row.
        codes, scales: see `layout`; expert: int64, rows: int32 [BLOCK_N] of its N.
        GROUPS, scale_rows: of 128 columns in a row, and rows of scales in an expert.
    """
    if ACT is not None:
        acc = product_of_blocks(
            x, x_scales, x_row_scale, tokens, codes, scales, expert, rows, N, GROUPS,
            BITS, MANTISSA, WIDTH, ACT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif x_scales is not None:
        acc = product_of_codes(
            x, x_scales, tokens, codes, scales, expert, rows, N, GROUPS, scale_rows, HEIGHT, BLOCK_M, BLOCK_N
        )
    else:
        PLANES: tl.constexpr = 128 // UNIT
        RAW: tl.constexpr = -MANTISSA if SPECIALS == "integer" else 127 - BIAS
        WORDS: tl.constexpr = 2 if WIDTH == 16 else 1
        column = tl.arange(0, CHUNK)
        x_columns = x + tokens[None, :] * K + column[:, None]  # [CHUNK, BLOCK_M]
        code_rows = (
            codes + (expert * N + rows)[:, None] * (GROUPS * 16 * BITS) + column[None, :]
        )  # [BLOCK_N, CHUNK]
        scale_columns = scales + expert * (GROUPS * WORDS) * scale_rows + rows // HEIGHT  # [BLOCK_N]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for group in range(GROUPS):
            low = tl.load(scale_columns + group * WORDS * scale_rows)
            high = low
            if WORDS == 2:
                high = tl.load(scale_columns + (group * WORDS + 1) * scale_rows)
            for sub in tl.static_range(UNIT // CHUNK):
                first = tl.load(code_rows + (group * 16 * BITS + sub * CHUNK))
                second, third = first, first
                if BITS == 6:
                    second = tl.load(code_rows + (group * 16 * BITS + UNIT + sub * CHUNK))
                    third = tl.load(code_rows + (group * 16 * BITS + 2 * UNIT + sub * CHUNK))
                for p in tl.static_range(PLANES):
                    k = group * 128 + (p * UNIT + sub * CHUNK)
                    if EVEN_K:
                        a = tl.load(x_columns + k)
                    else:
                        a = tl.load(x_columns + k, mask=(k + column)[:, None] < K, other=0.0)
                    number = decode.plane_raw(first, second, third, p, BITS, MANTISSA, SPECIALS)
                    if IN_TILE:
                        w = decode.weights(
                            number, low, high, (p * UNIT + sub * CHUNK) // WIDTH, SCALE, WIDTH, RAW
                        )
                        acc = tl.dot(w.to(a.dtype), a, acc, input_precision="ieee")
                    else:
                        w = number * decode.two_to(RAW)
                        part = tl.dot(w.to(a.dtype), a, input_precision="ieee")
                        if SCALE == "f32":
                            scale = low
                        else:
                            scale = decode.e8m0_value(
                                decode.block_byte(low, (p * UNIT + sub * CHUNK) // WIDTH)
                            )
                        acc = tl.fma(part, tl.broadcast_to(scale[:, None], part.shape), acc)
    return acc


@triton.jit
def scaled(acc, row_scale, bias, rows, ROW_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    """acc [N, M] times each row's tensor scale, plus each row's bias; `rows` counts through all experts."""
    # Spelt as fma: whether a compiler joins a product and a sum must not depend on the tile's shape.
    if ROW_SCALE and HAS_BIAS:
        factor = tl.broadcast_to(tl.load(row_scale + rows)[:, None], acc.shape)
        return tl.fma(acc, factor, tl.broadcast_to(tl.load(bias + rows).to(tl.float32)[:, None], acc.shape))
    elif ROW_SCALE:
        return acc * tl.load(row_scale + rows)[:, None]
    elif HAS_BIAS:
        return acc + tl.load(bias + rows).to(tl.float32)[:, None]
    else:
        return acc


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    y,
    x,
    x_scales,
    x_row_scale,
    codes,
    scales,
    row_scale,
    bias,
    M,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    # Past the end a tile repeats the last row and token, and stores neither.
    rows, tokens = tl.minimum(n, N - 1), tl.minimum(m, M - 1).to(tl.int64)
    acc = product(
        x, x_scales, x_row_scale, tokens, codes, scales, tl.program_id(1).to(tl.int64), rows, N, K, GROUPS, scale_rows,
        BITS, MANTISSA, BIAS, SPECIALS, SCALE, HEIGHT, WIDTH, UNIT, CHUNK, IN_TILE, EVEN_K, ACT, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    acc = scaled(acc, row_scale, bias, rows, ROW_SCALE, HAS_BIAS)
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y + tokens[None, :] * N + n[:, None], acc.to(y.dtype.element_ty), mask=mask)


def linear(x: Tensor, w: Packed | Blocks, bias: Tensor | None, act: Format | None = None) -> Tensor:
    """[M, K] -> [M, N] in x's dtype; M and N at least 1. `act`: x is rounded to it first, see `rounded.rows_of`."""
    m, (n, k) = x.shape[0], w.shape
    a = rows_of(x, act, isinstance(w, Blocks))
    y = torch.empty(m, n, dtype=tiles.stored_dtype(x.dtype), device=x.device)
    tile = tiles.choose(w, a.dtype, m, x.device, a.scales is not None)
    with tiles.on(x.device):
        _linear_kernel[(-(-n // tile.block_n) * -(-m // tile.block_m), 1)](
            y,
            a.x,
            a.scales,
            a.row_scale,
            w.codes,
            w.scales,
            w.row_scale,
            bias,
            m,
            n,
            k,
            w.groups,
            w.scales.shape[-1],
            **w.constants(a.dtype),
            ACT=a.blocks,
            ROW_SCALE=w.row_scale is not None,
            HAS_BIAS=bias is not None,
            **tile.constants,
            **tile.compiler,
        )
    return y.to(x.dtype)
