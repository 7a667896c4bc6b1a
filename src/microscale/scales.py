"""Block scales: from a block's amax to the stored scale, and from the stored scale to its value."""

from __future__ import annotations

import torch
from torch import Tensor

from microscale.elements import decode_table, encode
from microscale.formats import E4M3, Element, Format

E8M0_NAN = 255
E4M3_NAN = 0x7F
E4M3_SMALLEST = 2.0**-9
_SUBNORMAL = 5e-324  # which Python, too, reads as 0 where torch was told to


def e8m0_from_amax(amax: Tensor, element: Element, rule: str) -> Tensor:
    """The E8M0 byte of each block, clamped to 0 .. 254; 255 (NaN) where amax is NaN or infinite.

    Integer arithmetic on the bits of amax, so that no logarithm is ever rounded. A zero block gets byte 0.

    Args:
        amax: float32, >= 0.
        rule: "even", "floor" or "ceil", as defined in `formats`.
    Returns:
        uint8, shape of amax.
    """
    bits = amax.view(torch.int32)
    fraction_of_max, emax = element.max_parts
    if emax == 0:
        # A subnormal amax may reach byte 1: read it as if the exponents of normal numbers went on to -127.
        bits = torch.where(bits < 0x800000, (bits << 1) - 0x800000, bits)
    if rule == "even":
        byte = (bits + (1 << (22 - element.mantissa_bits))).bitwise_right_shift_(23)
    elif rule == "ceil":
        byte = (bits >> 23) + ((bits & 0x7FFFFF) > fraction_of_max)
    else:
        byte = bits >> 23
    byte = byte.sub_(emax).clamp_(0, 254)
    return byte.masked_fill_(~torch.isfinite(amax), E8M0_NAN).to(torch.uint8)


def e8m0_factors(scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two normal numbers whose product is 2^(b-127), NaN for 255: none is read as 0 where subnormal ones are."""
    byte = scales.to(torch.int32)
    half = byte >> 1
    first = (half + 64).bitwise_left_shift_(23).masked_fill_(scales == E8M0_NAN, 0x7FC00000)
    second = (byte - half + 63).bitwise_left_shift_(23)
    return first.view(torch.float32).to(dtype), second.view(torch.float32).to(dtype)


def e8m0_value(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^(b-127), exact (byte 0 is a float32 subnormal); NaN for 255."""
    if dtype == torch.float64:
        first, second = e8m0_factors(scales, dtype)
        return first * second
    bits = scales.to(torch.int32).bitwise_left_shift_(23)
    bits.masked_fill_(scales == 0, 0x00400000).masked_fill_(scales == E8M0_NAN, 0x7FC00000)
    return bits.view(torch.float32).to(dtype)


def e4m3_from_amax(amax: Tensor, tensor_scale: Tensor, element: Element) -> Tensor:
    """NVFP4's block scale: E4M3 of amax / (max * tensor_scale), kept within [2^-9, 448]; NaN where amax is not finite.

    The lower bound keeps blocks that are tiny beside the tensor's amax from vanishing; a zero block gets it too.
    """
    wanted = divide(amax, element.max).div_(tensor_scale).clamp_(E4M3_SMALLEST, E4M3.max)
    return encode(wanted, E4M3).masked_fill_(~torch.isfinite(amax), E4M3_NAN)


def f32_from_amax(amax: Tensor, element: Element) -> Tensor:
    """amax / max in float32; 1 where that is 0 (a zero block); NaN where amax is not finite."""
    scale = divide(amax, element.max)
    scale.masked_fill_(scale == 0, 1.0)
    return scale.masked_fill_(~torch.isfinite(amax), float("nan"))


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once: by a Python number, torch multiplies with its reciprocal on CUDA and XPU."""
    return x / x.new_full((), by)


def scale_value(scales: Tensor, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The multipliers that stored block scales stand for, without the tensor scale; shape kept."""
    if fmt.scale == "e8m0":
        return e8m0_value(scales, dtype)
    if fmt.scale == "e4m3":
        table = decode_table(E4M3, dtype, scales.device)
        return torch.nn.functional.embedding(scales.to(torch.int32), table).squeeze(-1)
    return scales.to(dtype)


def scale_factors(scales: Tensor, fmt: Format, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Numbers to multiply elements by, one after the other, instead of by `scale_value`; none is flushed to 0."""
    if fmt.scale == "e8m0" and _SUBNORMAL * 1.0 == 0.0:  # torch.set_flush_denormal; it is a fifth slower
        return e8m0_factors(scales, dtype)
    return (scale_value(scales, fmt, dtype),)
