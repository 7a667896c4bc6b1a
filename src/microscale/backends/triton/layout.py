"""How codes and scales lie in memory for the kernels, and the exact way back.

A row is cut into groups of 128 codes, the last one filled up with zero codes. A group is one or more *planes* of
consecutive codes, and one load of bytes serves them all, without moving anything between lanes:

    4-bit  2 planes of 64:  byte j = code[j] | code[64 + j] << 4
    6-bit  4 planes of 32:  byte j of part i = code[32 i + j] | (code[96 + j] >> 2 i & 3) << 6,  i = 0, 1, 2
    8-bit  1 plane of 128:  byte j = code[j]

A group's one-byte scales are the bytes of one 32-bit word (NVFP4: two), and the words of neighbouring rows are
neighbours, so that a tile reads them in one coalesced load.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from microscale.elements import pack_codes, unpack_codes
from microscale.formats import Element, Format
from microscale.quant import CHUNK, QuantTensor
from microscale.scales import E8M0_NAN

GROUP = 128
_PLANES = {4: 2, 6: 4, 8: 1}


@dataclass(frozen=True, eq=False)
class Packed:
    """What the kernels read.

    Attributes:
        format, shape, rule: as in the `QuantTensor`, [N, K] or [E, N, K].
        codes: uint8 [E, N, groups * 16 * bits], E = 1 for a matrix.
        scales: int32 words, or float32 for block FP8: [E, groups * words, ceil(N / rows)].
        row_scale: float32 [E, N], the tensor scale spread over rows; None without one.
        tensor_scale: as it came, for `unpack`.
        exponents: least and greatest E8M0 byte of blocks that hold a number other than 0; (127, 127) elsewhere.
    """

    format: Format
    shape: tuple[int, ...]
    rule: str | None
    codes: Tensor
    scales: Tensor
    row_scale: Tensor | None
    tensor_scale: Tensor | None
    exponents: tuple[int, int]

    @property
    def groups(self) -> int:
        """Groups of 128 codes in a row."""
        return -(-self.shape[-1] // GROUP)

    def scale_in_tile(self, dtype: torch.dtype) -> bool:
        """Whether every code times its block scale is a number of `dtype`, so that the product can take it.

        Block FP8's float32 scales have too many bits. E8M0 scales have none, and the question is only whether the
        exponent still fits: the least bit of the element above the least subnormal, its maximum below overflow.
        """
        if self.format.scale == "f32":
            return False
        if self.format.scale == "e4m3":  # 2 + 4 significant bits, 2^-10 to 2688: bfloat16 and float16 hold it
            return True
        least, greatest = exponent_range(self.format.element, dtype)
        return least <= self.exponents[0] and self.exponents[1] <= greatest

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """The kernels' compile-time description of the format, for activations of `dtype`. Do not write to it."""
        return constants(self.format, self.scale_in_tile(dtype), self.shape[-1] % GROUP == 0)


@cache
def constants(fmt: Format, in_tile: bool, even_k: bool) -> dict[str, Any]:
    """The kernels' compile-time description of a format, and of how it is read. Do not write to it."""
    element = fmt.element
    unit = GROUP // _PLANES[element.bits]
    return {
        "BITS": element.bits,
        "MANTISSA": element.mantissa_bits,
        "BIAS": element.bias,
        "SPECIALS": specials(element),
        "SCALE": fmt.scale,
        "HEIGHT": fmt.block[0],
        "WIDTH": fmt.block[1],
        "UNIT": unit,
        # One scale for each dot where the accumulator takes it.
        "CHUNK": min(unit, 64 if in_tile else fmt.block[1]),
        "IN_TILE": in_tile,
        "EVEN_K": even_k,
    }


def specials(element: Element) -> str:
    """What the top of the element's range means: "integer", "ieee", "nan" (one code only) or "none"."""
    if element.exponent_bits == 0:
        return "integer"
    return "ieee" if element.ieee_specials else "none" if element.nan_code is None else "nan"


@cache
def exponent_range(element: Element, dtype: torch.dtype) -> tuple[int, int]:
    """The E8M0 bytes, both included, with which every finite code of the element is exact in `dtype`.

    The kernel's own multiplier, 2^(byte - bias), must be a normal float32 besides.
    """
    info = torch.finfo(dtype)
    quantum = 2.0 ** (element.emin - element.mantissa_bits) if element.exponent_bits else 2.0**-6
    bias = element.bias if element.exponent_bits else 127 + element.mantissa_bits
    largest = max(abs(v) for v in element.values if abs(v) < float("inf"))
    fits = [
        byte
        for byte in range(255)
        if quantum * 2.0 ** (byte - 127) >= info.smallest_normal * info.eps
        and largest * 2.0 ** (byte - 127) <= info.max
        and -126 <= byte - bias <= 127
    ]
    return fits[0], fits[-1]


def pack(w: QuantTensor) -> Packed:
    """[N, K] or [E, N, K] into the kernels' layout. Waits for the device: it looks at the scales' range."""
    fmt, k = w.format, w.shape[-1]
    experts, n = (w.shape[0] if len(w.shape) == 3 else 1), w.shape[-2]
    groups = -(-k // GROUP)
    row_bytes = groups * GROUP * fmt.element.bits // 8
    rows = w.codes.reshape(experts * n, w.codes.shape[-1])
    codes = torch.empty(experts * n, row_bytes, dtype=torch.uint8, device=w.device)
    step = max(CHUNK * 16 // max(k, 1), 1)
    for start in range(0, rows.shape[0], step):
        part = unpack_codes(rows[start : start + step], fmt.element.bits, k)
        codes[start : start + step] = _pack_rows(part, fmt.element.bits)
    return Packed(
        fmt,
        w.shape,
        w.rule,
        codes.view(experts, n, row_bytes),
        _pack_scales(w.scales.reshape(experts, *w.scales.shape[-2:]), fmt, groups),
        row_scale(w),
        w.tensor_scale,
        scale_range(w),
    )


def row_scale(w: QuantTensor) -> Tensor | None:
    """The tensor scale spread over rows, float32 [E, N], E = 1 for a matrix; None without one."""
    if w.tensor_scale is None:
        return None
    experts = w.shape[0] if len(w.shape) == 3 else 1
    return w.tensor_scale.expand(w.shape[:-1]).reshape(experts, w.shape[-2]).contiguous()


def pack_again(w: QuantTensor, why: str) -> Packed:
    """`pack`, for weights that stay in memory in a GPU's own layout, too; warns, and says why."""
    warnings.warn(
        f"{w.format.name} weights {w.shape} are kept a second time, in the layout of all GPUs: {why}",
        stacklevel=3,
    )
    return pack(w)


def unpack(packed: Packed) -> QuantTensor:
    """The exact inverse of `pack`."""
    fmt, shape, bits = packed.format, packed.shape, packed.format.element.bits
    k = shape[-1]
    rows = packed.codes.flatten(0, 1)
    codes = torch.empty(rows.shape[0], fmt.packed_columns(k), dtype=torch.uint8, device=rows.device)
    step = max(CHUNK * 16 // max(k, 1), 1)
    for start in range(0, rows.shape[0], step):
        part = _unpack_rows(rows[start : start + step], bits)[:, :k]
        codes[start : start + step] = pack_codes(part, bits)
    scales = packed.scales.transpose(1, 2).contiguous()
    if fmt.scale != "f32":
        scales = scales.view(torch.uint8)
    height, width = fmt.scale_shape(shape[-2], k)
    scales = scales[..., :width].reshape(*shape[:-2], height, width)
    return QuantTensor(
        fmt, shape, codes.view(*shape[:-1], codes.shape[-1]), scales, packed.tensor_scale, packed.rule
    )


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, K], one code a byte -> [rows, groups * 16 * bits]."""
    k = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, -k % GROUP)) if k % GROUP else codes
    if bits == 8:
        return codes
    plane = codes.unflatten(-1, (-1, _PLANES[bits], GROUP // _PLANES[bits])).unbind(-2)
    if bits == 4:
        halves: Tensor = plane[0] | plane[1] << 4
        return halves.flatten(-2)
    parts = [plane[i] | (plane[3] >> 2 * i & 3) << 6 for i in range(3)]
    return torch.stack(parts, dim=-2).flatten(-3)


def _unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 [rows, groups * 128], one code a byte, padding included."""
    if bits == 8:
        return packed
    if bits == 4:
        half = packed.unflatten(-1, (-1, GROUP // 2))
        return torch.stack((half & 15, half >> 4), dim=-2).flatten(-3)
    part = packed.unflatten(-1, (-1, 3, GROUP // 4)).unbind(-2)
    last = part[0] >> 6 | part[1] >> 6 << 2 | part[2] >> 6 << 4
    return torch.stack((part[0] & 63, part[1] & 63, part[2] & 63, last), dim=-2).flatten(-3)


def _pack_scales(scales: Tensor, fmt: Format, groups: int) -> Tensor:
    """[E, rows, blocks] -> [E, groups * words, rows]; what is missing in the last group becomes 0."""
    wanted = groups * (GROUP // fmt.block[1])
    if scales.shape[-1] != wanted:
        scales = torch.nn.functional.pad(scales, (0, wanted - scales.shape[-1]))
    if fmt.scale != "f32":
        scales = scales.contiguous().view(torch.int32)
    return scales.transpose(1, 2).contiguous()


def scale_range(w: QuantTensor) -> tuple[int, int]:
    """Least and greatest E8M0 byte that multiplies anything; NaN scales apart, they are exact in every dtype."""
    fmt = w.format
    if fmt.scale != "e8m0" or w.scales.numel() == 0:
        return 127, 127
    scales = w.scales.reshape(-1, w.scales.shape[-1])
    rows = w.codes.reshape(-1, w.codes.shape[-1])
    usual = exponent_range(fmt.element, torch.float16)
    if usual[0] <= int(scales.min()) and int(scales.max()) <= usual[1]:
        return int(scales.min()), int(scales.max())
    # Rare, and worth a look at the codes: a zero block has byte 0, and any multiplier does for it.
    least, greatest = E8M0_NAN, 0
    k, magnitude = w.shape[-1], (1 << (fmt.element.bits - 1)) - 1
    if fmt.element.exponent_bits == 0:
        magnitude = 255  # two's complement: code 0x80 is no zero
    step = max(CHUNK * 16 // max(k, 1), 1)
    for start in range(0, rows.shape[0], step):
        codes = unpack_codes(rows[start : start + step], fmt.element.bits, k) & magnitude
        codes = torch.nn.functional.pad(codes, (0, -k % fmt.block[1]))
        used = codes.unflatten(-1, (-1, fmt.block[1])).amax(dim=-1) > 0
        part = scales[start : start + step]
        part = part[used & (part != E8M0_NAN)]
        if part.numel():
            least, greatest = min(least, int(part.min())), max(greatest, int(part.max()))
    return (least, greatest) if least <= greatest else (127, 127)
