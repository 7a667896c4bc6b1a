"""Activations in a format, as `quant.quantize` rounds them, in one kernel: no number waits for the device.

Of MX formats come the numbers that they stand for, in bfloat16, which holds them: significands have 8 bits or fewer
and scales are powers of two. So every kernel of 16-bit activations multiplies quantised ones exactly. Codes and scales
come of FP8 with a float32 scale for each token and 128 columns, for FP8 matrix units, and of MX formats and NVFP4 where
units are block-scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton import tiles
from microscale.backends.triton.layout import GROUP
from microscale.formats import Format

_COLUMNS = 512  # of a program, which is one warp: more wait for one another


@triton.jit
def _power(e):
    """float32 2^e, -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _on_grid(v, MANTISSA: tl.constexpr, EMIN: tl.constexpr, MAX: tl.constexpr, INTEGER: tl.constexpr):
    """(q, e): |v| is about q * 2^(e - MANTISSA), q a whole number, to nearest and ties to even, at most MAX in all."""
    a = tl.abs(v)
    a = tl.where(a > MAX, MAX, a)
    e = (a.to(tl.int32, bitcast=True) >> 23) - 127
    e = tl.where((e < EMIN) | INTEGER, EMIN, e)
    q = a * _power(MANTISSA - e)
    # Numbers below 2^22 lose their fraction to a sum above 2^23, rounded as all sums are.
    return (q + 8388608.0) - 8388608.0, e


@triton.jit
def _bits_of_amax(x):
    """Of each block [B, W] the greatest magnitude's bits: infinities and NaN above every number."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _on_scale(
    v,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """(q, e, scale, finite) of blocks v [B, W]: |v| is about q * 2^(e - MANTISSA + scale); scale and finite are [B]."""
    bits = _bits_of_amax(v)
    finite = bits < 0x7F800000
    if EMAX == 0:  # a subnormal amax may reach byte 1, see `scales.e8m0_from_amax`
        bits = tl.where(bits < 0x800000, (bits << 1) - 0x800000, bits)
    # The rule "even": the scale of amax rounded to the element's significand.
    byte = ((bits + (1 << (22 - MANTISSA))) >> 23) - EMAX
    scale = tl.minimum(tl.maximum(byte, 0), 254) - 127
    # Two normal factors, so that none is flushed or rounded.
    half = scale >> 1
    q, e = _on_grid(v * _power(-half)[:, None] * _power(half - scale)[:, None], MANTISSA, EMIN, MAX, INTEGER)
    return q, e, scale, finite


@triton.jit
def _numbers_kernel(
    y,
    x,
    K,
    WIDTH: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
    INTEGER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y [M, K] = x [M, K] as it reads back from an MX format; a block that is not finite becomes NaN."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS).reshape(COLUMNS // WIDTH, WIDTH)
    at = tl.program_id(0).to(tl.int64) * K + column
    v = tl.load(x + at, mask=column < K, other=0.0).to(tl.float32)
    q, e, scale, finite = _on_scale(v, MANTISSA, EMIN, EMAX, MAX, INTEGER)
    half = scale >> 1  # two normal factors here, too
    number = q * _power(e - MANTISSA) * _power(half)[:, None] * _power(scale - half)[:, None]
    number = tl.where(v < 0, -number, number)
    number = tl.where(finite[:, None], number, float("nan"))
    tl.store(y + at, number.to(y.dtype.element_ty), mask=column < K)


@triton.jit
def _packed(
    v,
    q,
    e,
    finite,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """uint8 [COLUMNS * BITS / 8]: codes of `_on_grid`'s numbers [B, W], with v's signs; two of 4 bits in a byte."""
    sign = (v.to(tl.int32, bitcast=True) >> 31) & (1 << (BITS - 1))
    code = tl.where(finite[:, None], (((e - EMIN) << MANTISSA) + q.to(tl.int32)) | sign, 0)
    if BITS == 4:
        low, high = code.reshape(COLUMNS // 2, 2).split()
        code = low | high << 4
    return code.reshape(COLUMNS * BITS // 8).to(tl.uint8)


@triton.jit
def _blocks_kernel(
    codes,
    scales,
    x,
    K,
    GROUPS,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Codes [M, GROUPS * 16 * BITS], packed as `quantize` does, and E8M0 bytes [M, GROUPS * 128 / WIDTH] of x [M, K];
    zeros behind K, and a block that is not finite is zeros with the scale NaN."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS).reshape(COLUMNS // WIDTH, WIDTH)
    v = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    q, e, scale, finite = _on_scale(v, MANTISSA, EMIN, EMAX, MAX, False)
    BYTES: tl.constexpr = COLUMNS * BITS // 8
    place = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    stride = GROUPS * (16 * BITS)
    code = _packed(v, q, e, finite, BITS, MANTISSA, EMIN, COLUMNS)
    tl.store(codes + row * stride + place, code, mask=place < stride)
    block = tl.program_id(1) * (COLUMNS // WIDTH) + tl.arange(0, COLUMNS // WIDTH)
    blocks = GROUPS * (128 // WIDTH)
    byte = tl.where(finite, scale + 127, 255).to(tl.uint8)
    tl.store(scales + row * blocks + block, byte, mask=block < blocks)


@triton.jit
def _nvfp4_kernel(
    codes,
    scales,
    row_scale,
    x,
    K,
    GROUPS,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """E2M1 codes [M, GROUPS * 64], E4M3 bytes [M, GROUPS * 8] and float32 scales [M] of x [M, K]; codes behind K are 0.
    A number that is not finite makes its block zeros with the scale NaN, and has no part in its row's scale."""
    BLOCKS: tl.constexpr = COLUMNS // 16
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    most = tl.zeros((COLUMNS,), tl.int32)
    for step in range(STEPS):
        at = step * COLUMNS + column
        v = tl.load(x + row * K + at, mask=at < K, other=0.0).to(tl.float32)
        bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        most = tl.maximum(most, tl.where(bits < 0x7F800000, bits, 0))
    amax = tl.max(most, axis=0).to(tl.float32, bitcast=True)
    outer = tl.div_rn(amax, tl.full((), 448.0 * 6.0, tl.float32))
    outer = tl.where(outer > 0.0, outer, 1.0)
    tl.store(row_scale + row, outer)
    for step in range(STEPS):
        at = (step * COLUMNS + column).reshape(BLOCKS, 16)
        v = tl.load(x + row * K + at, mask=at < K, other=0.0).to(tl.float32)
        bits = _bits_of_amax(v)
        finite = bits < 0x7F800000
        wanted = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full((BLOCKS,), 6.0, tl.float32))
        wanted = tl.div_rn(wanted, tl.broadcast_to(outer, wanted.shape))
        q, e = _on_grid(tl.maximum(wanted, 0.001953125), 3, -6, 448.0, False)
        byte = tl.where(finite, ((e + 6) << 3) + q.to(tl.int32), 0x7F).to(tl.uint8)
        # Beside a tiny outer scale the product may round to 0, and 0 / 0 is no code.
        least = tl.full((BLOCKS,), 1, tl.int32).to(tl.float32, bitcast=True)
        scale = tl.maximum(q * _power(e - 3) * outer, least)
        q, e = _on_grid(tl.div_rn(v, tl.broadcast_to(scale[:, None], v.shape)), 1, 0, 6.0, False)
        code = _packed(v, q, e, finite, 4, 1, 0, COLUMNS)
        place = step * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        tl.store(codes + row * (GROUPS * 64) + place, code, mask=place < GROUPS * 64)
        block = step * BLOCKS + tl.arange(0, BLOCKS)
        tl.store(scales + row * (GROUPS * 8) + block, byte, mask=block < GROUPS * 8)


@triton.jit
def _codes_kernel(
    codes,
    scales,
    x,
    K,
    GROUPS,
    scale_m,
    scale_g,
    WIDTH: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    MAX: tl.constexpr,
    COLUMNS: tl.constexpr,
    CONVERTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """E4M3 codes [M, GROUPS * 128], zeros behind K, and float32 scales [M, GROUPS], with these strides, of x [M, K]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = COLUMNS // WIDTH
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS).reshape(BLOCKS, WIDTH)
    v = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    bits = _bits_of_amax(v)
    finite = bits < 0x7F800000
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full((BLOCKS,), MAX, tl.float32))
    scale = tl.where(scale == 0.0, 1.0, scale)
    scaled = tl.div_rn(v, tl.broadcast_to(scale[:, None], v.shape))
    if CONVERTS:  # in hardware, to nearest and ties to even
        scaled = tl.minimum(tl.maximum(scaled, -MAX), MAX)
        code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        q, e = _on_grid(scaled, MANTISSA, EMIN, MAX, False)
        code = (((e - EMIN) << MANTISSA) + q.to(tl.int32) + tl.where(v < 0, 128, 0)).to(tl.uint8)
    code = tl.where(finite[:, None], code, 0)
    tl.store(codes + row * (GROUPS * WIDTH) + column, code, mask=column < GROUPS * WIDTH)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = scales + row * scale_m + block * scale_g
    tl.store(at, tl.where(finite, scale, float("nan")), mask=block < GROUPS)


@dataclass(frozen=True)
class Rows:
    """Activations as a product reads them.

    Attributes:
        x: [M, K] numbers, contiguous; with `scales` codes, uint8 [M, groups * 16 * bits].
        scales: float32 [M, groups], each of 128 columns, or with `blocks` bytes, uint8 [M, groups * 4] and of NVFP4
            [M, groups * 8]; None: x are numbers.
        dtype: of the numbers that are multiplied, or what else holds them.
        blocks: for block-scaled units, the element of codes x: "e2m1", "e4m3" or "e5m2".
        row_scale: float32 [M], of NVFP4: each row's tensor scale.
    """

    x: Tensor
    scales: Tensor | None
    dtype: torch.dtype
    blocks: str | None = None
    row_scale: Tensor | None = None


def rows_of(x: Tensor, act: Format | None, blocks: bool = False) -> Rows:
    """x [M, K] as it is, or in `act`: an MX format or FP8 with a scale for each 128 columns. M and K at least 1.

    Args:
        blocks: codes of MXFP4, MXFP8 or NVFP4 and their scales, instead of numbers.
    """
    if act is None:
        return Rows(tiles.as_stored(x), None, x.dtype)
    if act.scale == "f32":
        return Rows(*codes_of(x, act), x.dtype)
    if blocks:
        codes, scales, row_scale = blocks_of(x, act)
        return Rows(codes, scales, torch.bfloat16, act.element.name, row_scale)
    y = torch.empty_like(x, dtype=tiles.stored_dtype(torch.bfloat16), memory_format=torch.contiguous_format)
    (m, k), element = x.shape, act.element
    with tiles.on(x.device):
        _numbers_kernel[(m, -(-k // _COLUMNS))](
            y, tiles.as_stored(x), k, WIDTH=act.block[1], MANTISSA=element.mantissa_bits,
            EMIN=element.emin if element.exponent_bits else 0, EMAX=element.max_parts[1], MAX=element.max,
            INTEGER=element.exponent_bits == 0, COLUMNS=_COLUMNS, num_warps=1, **tiles.launch(early=False),
        )  # fmt: skip
    return Rows(y, None, torch.bfloat16)


def blocks_of(x: Tensor, act: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 [M, groups * 16 * bits], scale bytes uint8 [M, groups * 128 / width] and, of NVFP4, tensor scales
    float32 [M], of x [M, K]; codes behind K are 0."""
    (m, k), element, x = x.shape, act.element, tiles.as_stored(x)
    groups = -(-k // GROUP)
    codes = torch.empty(m, groups * GROUP * element.bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(m, groups * (GROUP // act.block[1]), dtype=torch.uint8, device=x.device)
    outer = torch.empty(m, dtype=torch.float32, device=x.device) if act.tensor_scale else None
    launch = tiles.launch(early=False)
    with tiles.on(x.device):
        if outer is not None:
            steps = -(-k // _COLUMNS)
            _nvfp4_kernel[(m,)](codes, scales, outer, x, k, groups, STEPS=steps, COLUMNS=_COLUMNS, **launch)
        else:
            _blocks_kernel[(m, -(-k // _COLUMNS))](
                codes, scales, x, k, groups, WIDTH=act.block[1], BITS=element.bits, MANTISSA=element.mantissa_bits,
                EMIN=element.emin, EMAX=element.emax, MAX=element.max, COLUMNS=_COLUMNS, num_warps=1, **launch,
            )  # fmt: skip
    return codes, scales, outer


def codes_of(
    x: Tensor, act: Format, by_column: bool = False, rows: int = 1, columns: int = 1
) -> tuple[Tensor, Tensor]:
    """E4M3 codes uint8 [M, groups * 128], zeros behind K, and float32 scales [M, groups] of x [M, K].

    Args:
        by_column: the tokens of a group have their scales side by side.
        rows: there is memory for a multiple of so many behind the last one, with anything in it.
        columns: as `rows`, of each token's scales.
    """
    (m, k), element, x = x.shape, act.element, tiles.as_stored(x)
    groups, room = -(-k // GROUP), -(-m // rows) * rows
    codes = torch.empty(room, groups * GROUP, dtype=torch.uint8, device=x.device)
    wide = -(-groups // columns) * columns
    scales = torch.empty((wide, room) if by_column else (room, wide), dtype=torch.float32, device=x.device)
    scales = (scales.t() if by_column else scales)[:, :groups]
    early = tiles.target(x.device).early
    with tiles.on(x.device):
        _codes_kernel[(m, -(-k // _COLUMNS))](
            codes, scales, x, k, groups, *scales.stride(), WIDTH=GROUP, MANTISSA=element.mantissa_bits,
            EMIN=element.emin, MAX=element.max, COLUMNS=_COLUMNS, CONVERTS=not tiles.INTERPRETED, num_warps=1,
            PDL=early, **tiles.launch(early),
        )  # fmt: skip
    return codes, scales
