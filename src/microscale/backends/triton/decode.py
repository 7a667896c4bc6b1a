"""Codes and scales to numbers, in registers. Integer operations on bits and exact float32 products only.

An element's bits, shifted to where float32 keeps its exponent and fraction, are its value times 2^(bias - 127): a
subnormal code becomes a subnormal float32, which every target multiplies exactly. `raw` is that number, and the
missing power of two goes into the multiplier.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane_raw(
    first,
    second,
    third,
    PLANE: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    SPECIALS: tl.constexpr,
):
    """`raw` of one plane of codes from the group's bytes (uint8; 6-bit has three parts). See `layout`."""
    if BITS == 4:
        # One product puts the nibble's exponent and fraction to bits 24..22 and its sign to bit 31.
        nibble = first.to(tl.uint32) & (15 << 4 * PLANE)
        bits = nibble * ((1 << (22 - 4 * PLANE)) + (1 << (28 - 4 * PLANE))) & 0x81C00000
        return bits.to(tl.float32, bitcast=True)
    elif BITS == 8:
        return raw(first.to(tl.int32), BITS, MANTISSA, SPECIALS)
    elif PLANE == 0:
        return raw(first.to(tl.int32) & 63, BITS, MANTISSA, SPECIALS)
    elif PLANE == 1:
        return raw(second.to(tl.int32) & 63, BITS, MANTISSA, SPECIALS)
    elif PLANE == 2:
        return raw(third.to(tl.int32) & 63, BITS, MANTISSA, SPECIALS)
    else:
        code = (
            (first.to(tl.int32) >> 6) | ((second.to(tl.int32) >> 6) << 2) | ((third.to(tl.int32) >> 6) << 4)
        )
        return raw(code, BITS, MANTISSA, SPECIALS)


@triton.jit
def raw(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, SPECIALS: tl.constexpr):
    """int32 codes -> float32, the value times 2^-RAW, with RAW = 127 - bias (INT8: -6); infinities and NaNs as such."""
    if SPECIALS == "integer":
        # 2^23 + (value + 128) is exact, and so is the difference; a conversion instruction is slower.
        return ((code ^ 128) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    else:
        magnitude = code & ((1 << (BITS - 1)) - 1)
        bits = magnitude << (23 - MANTISSA)
        if (
            SPECIALS == "ieee"
        ):  # the top exponent field becomes float32's, its fraction stays: infinity or NaN
            bits = tl.where(magnitude >= 0x7C, bits | 0x7F800000, bits)
        elif SPECIALS == "nan":
            bits = tl.where(magnitude == 0x7F, 0x7FC00000, bits)
        bits = bits | ((code & (1 << (BITS - 1))) << (32 - BITS))
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def two_to(EXPONENT: tl.constexpr):
    """The number 2^EXPONENT, float32 and normal."""
    return tl.full((1, 1), (EXPONENT + 127) << 23, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_value(byte):
    """2^(byte - 127), exact: byte 0 is a float32 subnormal; NaN for 255."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_value(byte):
    """E4M3, sign and NaN included."""
    return raw(byte, 8, 3, "nan") * 1.329227995784916e36  # 2^120


@triton.jit
def block_byte(words, BLOCK: tl.constexpr):
    """The scale byte of one block of the group, int32, from its word."""
    return (words >> (8 * (BLOCK % 4))) & 255


@triton.jit
def multiplier(words, BLOCK: tl.constexpr, SCALE: tl.constexpr, RAW: tl.constexpr):
    """What one block's `raw` numbers are multiplied with, float32: the scale, and for E8M0 the missing 2^RAW too.

    2^RAW times an E4M3 scale may leave float32; there it is a factor of its own, see `weights`.
    """
    byte = block_byte(words, BLOCK)
    if SCALE == "e8m0":
        # Bytes that leave float32 here do not come this way (`layout.exponent_range`), but for those of zero
        # blocks, whose multiplier becomes 0.
        bits = tl.where(byte == 255, 0x7FC00000, tl.maximum(byte + RAW, 0) << 23)
        return bits.to(tl.float32, bitcast=True)
    else:
        return e4m3_value(byte)


@triton.jit
def weights(
    number,
    low,
    high,
    FIRST: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    RAW: tl.constexpr,
):
    """`raw` [N, CHUNK] times the scales of its blocks: exact values, float32.

    Args:
        low, high: scale words [N] of blocks 0..3 and 4..7 of the group (the second is NVFP4's).
        FIRST: the block of the group that the chunk begins with.
    """
    CHUNK: tl.constexpr = number.shape[1]
    column = tl.arange(0, CHUNK)[None, :]
    if SCALE == "e4m3":
        number = number * 8.507059173023462e37  # 2^126, E2M1's
    words = low if FIRST < 4 else high
    factor = multiplier(words, FIRST, SCALE, RAW)[:, None]
    for i in tl.static_range(1, CHUNK // WIDTH):
        words = low if FIRST + i < 4 else high
        # The comparison is about register numbers, so the compiler decides it.
        factor = tl.where(column < i * WIDTH, factor, multiplier(words, FIRST + i, SCALE, RAW)[:, None])
    return number * factor
