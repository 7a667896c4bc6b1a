"""Element codes <-> float32, and their packing into bytes. Vectorised torch, any device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from microscale.errors import FormatError
from microscale.formats import Element

# How four 6-bit codes v0..v3 lie in three bytes. Both come from AMD Quark and no file says which it is:
#   little     (0.10 and later)  one little-endian 24-bit word v0 | v1<<6 | v2<<12 | v3<<18
#   quark_0.9  (up to 0.9)       byte 0: the top two bits of v0..v3, v0 highest; bytes 1, 2: their low nibbles
BITSTREAMS = ("little", "quark_0.9")


def encode(x: Tensor, element: Element) -> Tensor:
    """Round to nearest, ties to the even code, saturating at +-max; -0 keeps its sign.

    Args:
        x: float32, finite or infinite (infinities saturate). What NaN becomes is not defined: callers mask it.
    Returns:
        uint8, same shape, one code in the low `element.bits` bits.
    """
    if element.exponent_bits == 0:
        limit = 2 ** (element.bits - 1) - 1
        return (
            x.mul(2.0**element.mantissa_bits).round_().clamp_(-limit, limit).to(torch.int8).view(torch.uint8)
        )
    m = element.mantissa_bits
    a = x.abs().clamp_(max=element.max)
    # Exponent of |x|, not below that of the subnormals; then |x| / 2^(e-m) is an exact multiplication.
    e = a.view(torch.int32).bitwise_right_shift(23).sub_(127).clamp_(min=element.emin)
    inverse_step = e.neg().add_(127 + m).bitwise_left_shift_(23).view(torch.float32)
    q = a.mul_(inverse_step).round_()  # torch rounds halves to even; q = 2^(m+1) carries into the exponent
    code = e.sub_(element.emin).bitwise_left_shift_(m).add_(q.to(torch.int32)).to(torch.uint8)
    return code.bitwise_or_(torch.signbit(x).to(torch.uint8).bitwise_left_shift_(element.bits - 1))


@cache
def decode_table(element: Element, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values by stored byte: [256, 2] for 4-bit elements (low nibble first), else [2^bits, 1]. Do not write to it."""
    with torch.inference_mode(False):  # a cached inference tensor could never meet autograd again
        values = torch.tensor(element.values, dtype=torch.float64, device="cpu")
        if element.bits == 4:
            byte = torch.arange(256, device="cpu")
            table = torch.stack((values[byte & 15], values[byte >> 4]), dim=1)
        else:
            table = values[:, None]
        return table.to(device=device, dtype=dtype)


def decode(packed: Tensor, element: Element, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The exact values of packed codes.

    Args:
        packed: uint8 [..., ceil(k * bits / 8)].
    Returns:
        [..., k] in `dtype` (float64, float32, or bfloat16: every element encoding is exact in each).
    """
    if element.bits == 6:
        packed = unpack_codes(packed, 6, k)
    table = decode_table(element, dtype, packed.device)
    values = torch.nn.functional.embedding(packed.to(torch.int32), table).flatten(-2)
    return values[..., :k]


def pack_codes(codes: Tensor, bits: int, bitstream: str = "little") -> Tensor:
    """One code a byte -> packed bytes; the last byte is filled up with zero codes.

    Args:
        codes: uint8 [..., k], each below 2^bits. 4-bit: the low nibble is the even k.
        bitstream: see `BITSTREAMS`; matters for 6-bit codes only.
    Returns:
        uint8 [..., ceil(k * bits / 8)].
    """
    _check_bitstream(bitstream)
    k = codes.shape[-1]
    if bits == 8:
        return codes
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, k % 2)) if k % 2 else codes
        return codes[..., 0::2] | codes[..., 1::2] << 4
    padded = torch.nn.functional.pad(codes, (0, -k % 4)) if k % 4 else codes
    v = padded.unflatten(-1, (-1, 4)).unbind(-1)
    if bitstream == "little":
        three = (v[0] | (v[1] & 3) << 6, v[1] >> 2 | (v[2] & 15) << 4, v[2] >> 4 | v[3] << 2)
    else:
        high = v[0] >> 4 << 6 | v[1] >> 4 << 4 | v[2] >> 4 << 2 | v[3] >> 4
        three = (high, (v[0] & 15) << 4 | v[1] & 15, (v[2] & 15) << 4 | v[3] & 15)
    return torch.stack(three, dim=-1).flatten(-2)[..., : _kept_bytes(k, bitstream)]


def unpack_codes(packed: Tensor, bits: int, k: int, bitstream: str = "little") -> Tensor:
    """The exact inverse of `pack_codes`.

    Args:
        packed: uint8 [..., ceil(k * bits / 8)].
    Returns:
        uint8 [..., k], one code a byte.
    """
    _check_bitstream(bitstream)
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :k]
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 3)) if packed.shape[-1] % 3 else packed
    b = padded.unflatten(-1, (-1, 3)).unbind(-1)
    if bitstream == "little":
        four = (b[0] & 63, b[0] >> 6 | (b[1] & 15) << 2, b[1] >> 4 | (b[2] & 3) << 4, b[2] >> 2)
    else:
        four = (
            b[0] >> 6 << 4 | b[1] >> 4,
            (b[0] >> 4 & 3) << 4 | b[1] & 15,
            (b[0] >> 2 & 3) << 4 | b[2] >> 4,
            (b[0] & 3) << 4 | b[2] & 15,
        )
    return torch.stack(four, dim=-1).flatten(-2)[..., :k]


def _kept_bytes(k: int, bitstream: str) -> int:
    # The older stream spreads each code over byte 0 and another one, so a partial group keeps all it touches.
    if bitstream == "little" or k % 4 == 0:
        return -(-k * 6 // 8)
    return k // 4 * 3 + (2 if k % 4 <= 2 else 3)


def _check_bitstream(bitstream: str) -> None:
    if bitstream not in BITSTREAMS:
        raise FormatError(f"unknown bitstream {bitstream!r}; known: {', '.join(BITSTREAMS)}")
