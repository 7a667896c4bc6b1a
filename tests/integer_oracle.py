"""The codecs from their definitions, in Python integers and fractions. Shares nothing with the package.

A number is (sign bit, magnitude); a magnitude is a Fraction, INF or NAN, so that -0 and NaN need no float.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache

INF, NAN = "inf", "nan"
Number = tuple[int, Fraction | str]

# bits, exponent bits, mantissa bits, bias
ELEMENTS = {
    "e2m1": (4, 2, 1, 1),
    "e2m3": (6, 2, 3, 1),
    "e3m2": (6, 3, 2, 3),
    "e4m3": (8, 4, 3, 7),
    "e5m2": (8, 5, 2, 15),
    "int8": (8, 0, 6, 0),
}
# exponent bits, mantissa bits
FLOATS = {"float64": (11, 52), "float32": (8, 23), "bfloat16": (8, 7), "float16": (5, 10)}


def power(exponent: int) -> Fraction:
    """2^exponent."""
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def floor_log2(x: Fraction) -> int:
    """For x > 0."""
    n, d = x.numerator, x.denominator
    e = n.bit_length() - d.bit_length()
    return e if (d << e <= n if e >= 0 else d <= n << -e) else e - 1


def nearest(x: Fraction, exponent: int) -> int:
    """x / 2^exponent rounded to an integer, ties to even."""
    n, d = (
        (x.numerator, x.denominator << exponent)
        if exponent >= 0
        else (x.numerator << -exponent, x.denominator)
    )
    whole, rest = divmod(n, d)
    return whole + (2 * rest > d or (2 * rest == d and whole & 1))


def decode(name: str, code: int) -> Number:
    """The number of one element code."""
    bits, exponent_bits, mantissa_bits, bias = ELEMENTS[name]
    if name == "int8":
        signed = int.from_bytes(bytes([code]), "little", signed=True)
        return int(signed < 0), Fraction(abs(signed), 64)
    sign = code >> (bits - 1)
    field = code >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = code & (1 << mantissa_bits) - 1
    if name == "e4m3" and (field, fraction) == (15, 7):
        return sign, NAN
    if name == "e5m2" and field == 31:
        return sign, NAN if fraction else INF
    significand = fraction + (1 << mantissa_bits if field else 0)
    return sign, significand * power(max(field, 1) - bias - mantissa_bits)


def e8m0(byte: int) -> Number:
    """The number of one E8M0 scale."""
    return 0, NAN if byte == 255 else power(byte - 127)


def from_float(x: float) -> Number:
    """The number of a Python float."""
    sign = int(math.copysign(1, x) < 0)
    return sign, NAN if math.isnan(x) else INF if math.isinf(x) else Fraction(abs(x))


def multiply(*numbers: Number) -> Number:
    """The exact product, with IEEE 754's rules for what is not finite."""
    sign = sum(s for s, _ in numbers) % 2
    magnitudes = [m for _, m in numbers]
    if NAN in magnitudes or (INF in magnitudes and 0 in magnitudes):
        return sign, NAN
    return sign, INF if INF in magnitudes else math.prod(magnitudes[1:], start=magnitudes[0])


def float_bits(number: Number, dtype: str) -> int:
    """The nearest `dtype`, ties to even, as its bits; one quiet NaN stands for all."""
    exponent_bits, mantissa_bits = FLOATS[dtype]
    sign, magnitude = number
    bias = (1 << exponent_bits - 1) - 1
    infinity = (1 << exponent_bits) - 1 << mantissa_bits
    if magnitude is NAN:
        return infinity | 1 << mantissa_bits - 1
    if magnitude is INF:
        bits = infinity
    elif magnitude == 0:
        bits = 0
    else:
        e = max(floor_log2(magnitude), 1 - bias)
        # The leading 1 of a normal significand adds itself to the exponent field.
        bits = min((e + bias - 1 << mantissa_bits) + nearest(magnitude, e - mantissa_bits), infinity)
    return sign << exponent_bits + mantissa_bits | bits


def float32(x: Fraction) -> Fraction | str:
    """x >= 0 rounded to float32."""
    bits = float_bits((0, x), "float32")
    field, fraction = bits >> 23, bits & 0x7FFFFF
    if field == 255:
        return INF
    return (fraction + (0x800000 if field else 0)) * power(max(field, 1) - 150)


@cache
def magnitudes(name: str) -> tuple[Fraction, ...]:
    """Finite magnitudes that an encoder writes, by magnitude code."""
    numbers = [decode(name, code) for code in range(1 << ELEMENTS[name][0] - 1)]
    return tuple(m for _, m in numbers if isinstance(m, Fraction))


def encode(name: str, number: Number) -> int:
    """The code whose value is nearest, found by search; of two as near, the even code."""
    sign, magnitude = number
    known = magnitudes(name)
    i = len(known) if magnitude is INF else bisect_left(known, magnitude)
    if i == len(known) or (i and (known[i] - magnitude, i & 1) > (magnitude - known[i - 1], i - 1 & 1)):
        i -= 1
    if name == "int8":
        return -i & 0xFF if sign else i
    return sign << ELEMENTS[name][0] - 1 | i


def e8m0_byte(rule: str, amax: Fraction, name: str) -> int:
    """The scale byte of a block with that amax: OCP floor, Quark's even, or ceil."""
    if amax == 0:
        return 0
    largest, mantissa_bits = magnitudes(name)[-1], ELEMENTS[name][2]
    e = floor_log2(amax)
    if rule == "even":
        half_up = math.floor(amax / power(e - mantissa_bits) + Fraction(1, 2))
        e = floor_log2(half_up * power(e - mantissa_bits)) - floor_log2(largest)
    elif rule == "floor":
        e -= floor_log2(largest)
    else:
        e = floor_log2(amax / largest)
        e += amax > largest * power(e)
    return min(max(e + 127, 0), 254)


def quantize_block(
    block: Sequence[Number], name: str, scale: str, rule: str, tensor_scale: Fraction | None = None
) -> tuple[int, list[int]]:
    """(stored scale: a byte or float32 bits, element codes).

    Division by a power of two is exact. Where a scale is any float, each step rounds to float32, in this
    order: amax / max, then / tensor scale; x / (block scale * tensor scale).
    """
    if any(m in (INF, NAN) for _, m in block):
        return {"e8m0": 255, "e4m3": 0x7F, "f32": float_bits((0, NAN), "float32")}[scale], [0] * len(block)
    amax = max(m for _, m in block)
    if scale == "e8m0":
        stored = e8m0_byte(rule, amax, name)
        step = power(stored - 127)
        return stored, [encode(name, (s, m / step)) for s, m in block]
    if scale == "f32":
        step = float32(amax / magnitudes(name)[-1]) or Fraction(1)
        stored = float_bits((0, step), "float32")
    else:
        wanted = float32(float32(amax / magnitudes(name)[-1]) / tensor_scale)
        wanted = Fraction(448) if wanted is INF else min(max(wanted, power(-9)), Fraction(448))
        stored = encode("e4m3", (0, wanted))
        # A product too small for float32 counts as float32's smallest number.
        step = float32(decode("e4m3", stored)[1] * tensor_scale) or power(-149)
    return stored, [encode(name, (s, float32(m / step))) for s, m in block]


def pack(codes: Iterable[int], bits: int) -> bytes:
    """Codes as one little-endian integer, the first in the lowest bits."""
    codes = list(codes)
    word = sum(code << bits * i for i, code in enumerate(codes))
    return word.to_bytes(-(-len(codes) * bits // 8), "little")
