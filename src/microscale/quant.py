"""`QuantTensor`, the canonical quantised tensor, and `quantize` / `dequantize` between it and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from microscale.elements import decode, encode, pack_codes
from microscale.errors import FormatError, PackedError
from microscale.formats import E4M3, Format, get_format
from microscale.scales import (
    divide,
    e4m3_from_amax,
    e8m0_from_amax,
    f32_from_amax,
    scale_factors,
    scale_value,
)

# Elements worked on at a time: temporaries stay in a core's L2, and quantising never needs a second full copy.
CHUNK = 1 << 18

# Float32 holds their numbers, and torch has their abs.
_NARROW = (torch.float32, torch.bfloat16, torch.float16)

_SCALE_DTYPES = {"e8m0": torch.uint8, "e4m3": torch.uint8, "f32": torch.float32}


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A tensor in a block-scaled format: plain data, the same for every producer and every backend.

    value[..., n, k] = element(codes)[..., n, k] * scale[..., n // rows, k // columns] * tensor_scale[..., n]

    Attributes:
        format: the record that says what the bytes mean.
        shape: logical shape [..., N, K]; a vector is [K].
        codes: uint8 [..., N, ceil(K * bits / 8)]; 4-bit: the low nibble is the even k; 6-bit: little-endian words.
        scales: uint8 (E8M0, E4M3) or float32 [..., ceil(N / rows), ceil(K / columns)], multipliers.
        tensor_scale: float32, broadcastable to [..., N]: one multiplier per tensor, expert, or row. None without one.
        rule: the scale rule that made the scales, None where a checkpoint does not say.
    """

    format: Format
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None
    rule: str | None = None

    def __post_init__(self) -> None:
        fmt, shape = self.format, self.shape
        if not shape or (fmt.block[0] > 1 and len(shape) < 2):
            raise FormatError(f"{fmt.name} cannot hold shape {shape}")
        _expect("codes", self.codes, torch.uint8, (*shape[:-1], fmt.packed_columns(shape[-1])))
        n = shape[-2] if len(shape) > 1 else 1
        blocks = fmt.scale_shape(n, shape[-1])
        _expect(
            "scales", self.scales, _SCALE_DTYPES[fmt.scale], (*shape[:-2], *blocks[2 - min(len(shape), 2) :])
        )
        if (self.tensor_scale is not None) != fmt.tensor_scale:
            wanted = "needs" if fmt.tensor_scale else "has no"
            raise FormatError(f"{fmt.name} {wanted} tensor_scale")
        if self.tensor_scale is not None:
            if self.tensor_scale.dtype != torch.float32:
                raise FormatError(f"tensor_scale is {self.tensor_scale.dtype}, not float32")
            _expect_broadcast(self.tensor_scale, shape[:-1])
        for what, part in (("scales", self.scales), ("tensor_scale", self.tensor_scale)):
            if part is not None and part.device != self.codes.device:
                raise FormatError(f"{what} on {part.device}, codes on {self.codes.device}")

    def __getattr__(self, name: str) -> Any:
        """Asked for what it has not.

        Raises:
            PackedError: tensors have it.
        """
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"QuantTensor has no attribute {name!r}")
        raise PackedError(
            f"packed weights are no tensor: they have no {name!r}. microscale.dequantize(weight) is one; what changes"
            " a layer's weight, as resize_token_embeddings does, has to do it before the layer is quantised"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and tensor scale."""
        parts = (self.codes, self.scales, self.tensor_scale)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same tensor on another device."""
        outer = None if self.tensor_scale is None else self.tensor_scale.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), tensor_scale=outer)

    def __getitem__(self, index: int) -> QuantTensor:
        """One entry of the leading dimension (an expert), as views. Needs at least three dimensions."""
        if len(self.shape) < 3:
            raise FormatError(f"shape {self.shape} has no leading dimension to index")
        outer = self.tensor_scale
        if outer is not None:
            outer = outer.expand(self.shape[:-1])[index]
        return replace(
            self, shape=self.shape[1:], codes=self.codes[index], scales=self.scales[index], tensor_scale=outer
        )

    def rows(self, start: int, stop: int) -> QuantTensor:
        """Rows [start, stop) of N, as views; `start` and an inner `stop` must lie on a block's edge."""
        if len(self.shape) < 2:
            raise FormatError(f"shape {self.shape} has no rows")
        n, height = self.shape[-2], self.format.block[0]
        if not 0 <= start <= stop <= n:
            raise FormatError(f"rows {start}:{stop} are not among {n}")
        if start % height or (stop % height and stop != n):
            raise FormatError(f"rows {start}:{stop} cut through {height}-row blocks of {self.format.name}")
        outer = self.tensor_scale
        if outer is not None and outer.dim() and outer.shape[-1] != 1:
            outer = outer[..., start:stop]
        return replace(
            self,
            shape=(*self.shape[:-2], stop - start, self.shape[-1]),
            codes=self.codes[..., start:stop, :],
            scales=self.scales[..., start // height : -(-stop // height), :],
            tensor_scale=outer,
        )


@torch.no_grad()
def quantize(
    x: Tensor,
    fmt: str | Format,
    *,
    rule: str | None = None,
    tensor_scale: Tensor | float | None = None,
    row_ranges: Sequence[int] | None = None,
) -> QuantTensor:
    """Store `x` in a format, rounding each number to nearest, ties to even.

    A block that holds a NaN or an infinity gets a NaN scale and zero codes: it never reads back finite. A zero
    block gets zero codes and the smallest scale (E8M0 byte 0, E4M3 2^-9, float32 1). -0 keeps its sign.

    Args:
        x: [..., N, K] (or [K]) floating point; float64 is rounded to float32 first. Any K: the last block of a
            row may be ragged, as may the last 128 rows of block FP8.
        fmt: a format or its name.
        rule: how a block's amax becomes its scale, one of `fmt.rules`, by default the first: "even", "floor",
            "ceil" for the MX formats.
        tensor_scale: NVFP4 only: the multiplier to use, broadcastable to [..., N]. By default
            amax / (448 * 6) of the finite numbers, one for each entry of the leading dimensions (expert).
        row_ranges: NVFP4 only: lengths that sum to N; each range of rows (q, k, v of a fused weight) gets its
            own default tensor scale.
    Raises:
        FormatError: unknown format or rule, not dense floating point, or an argument that the format has no use for.
    """
    fmt = get_format(fmt)
    rule = fmt.rules[0] if rule is None else rule
    if rule not in fmt.rules:
        raise FormatError(f"unknown scale rule {rule!r} for {fmt.name}; known: {', '.join(fmt.rules)}")
    if not x.is_floating_point() or x.dtype == torch.float4_e2m1fn_x2:  # two numbers an element
        raise FormatError(f"cannot quantize {x.dtype}")
    if x.layout != torch.strided:
        raise FormatError(f"cannot quantize a tensor in layout {x.layout}; x.to_dense() has all its numbers")
    if x.dim() == 0 or (x.dim() == 1 and fmt.block[0] > 1):
        raise FormatError(f"{fmt.name} cannot hold shape {tuple(x.shape)}")
    if not fmt.tensor_scale and (tensor_scale is not None or row_ranges is not None):
        raise FormatError(f"{fmt.name} has no tensor scale")
    outer = _tensor_scale(x, fmt, tensor_scale, row_ranges) if fmt.tensor_scale else None

    shape = tuple(x.shape)
    n, k = (shape[-2] if len(shape) > 1 else 1), shape[-1]
    lead = prod(shape[:-2])
    codes = torch.zeros(lead, n, fmt.packed_columns(k), dtype=torch.uint8, device=x.device)
    scales = torch.zeros(lead, *fmt.scale_shape(n, k), dtype=_SCALE_DTYPES[fmt.scale], device=x.device)
    flat = x.reshape(lead, n, k)
    flat_outer = None if outer is None else outer.expand(shape[:-1]).reshape(lead, n)
    if fmt.block[0] == 1:  # rows are independent: one long matrix
        flat, codes, scales = flat.flatten(0, 1)[None], codes.flatten(0, 1)[None], scales.flatten(0, 1)[None]
        flat_outer = None if flat_outer is None else flat_outer.flatten()[None]
    height = max(CHUNK // max(k, 1) // fmt.block[0], 1) * fmt.block[0]
    for i in range(flat.shape[0]):
        for row in range(0, flat.shape[1], height):
            part = slice(row, row + height)
            blocks = slice(row // fmt.block[0], -(-(row + height) // fmt.block[0]))
            outer_part = None if flat_outer is None else flat_outer[i, part]
            codes[i, part], scales[i, blocks] = _quantize_rows(flat[i, part].float(), fmt, rule, outer_part)
    one_row = len(shape) == 1
    return QuantTensor(
        fmt,
        shape,
        codes.view(*shape[:-1], codes.shape[-1]),
        scales.view(-1) if one_row else scales.view(*shape[:-2], *fmt.scale_shape(n, k)),
        outer,
        rule,
    )


def dequantize(q: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that `q` stands for, computed exactly and rounded once to `dtype`.

    Exact in float64 always. In float32 exact too where scales are E8M0, but for values of 2^128 and above
    (scale bytes near 254), which become infinite. A NaN scale makes its whole block NaN. Where the device has no
    float64, 16-bit results of formats with float scales are rounded to float32 first. Where torch is told to flush
    subnormal numbers (`torch.set_flush_denormal`), it may read those among float scales and results as 0.

    Returns:
        `q.shape`, in `dtype`.
    Raises:
        FormatError: `dtype` is no floating point: its numbers would be cut off.
    """
    if not dtype.is_floating_point:
        raise FormatError(f"{q.format.name} holds fractions, which {dtype} does not")
    fmt, shape = q.format, q.shape
    k, (height, width) = shape[-1], fmt.block
    out = torch.zeros(shape, dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out
    if fmt.scale == "e8m0":
        # Few enough significant bits that bfloat16 holds each product: half the traffic.
        work = dtype if dtype in (torch.float64, torch.bfloat16) else torch.float32
    else:
        work = torch.float64 if dtype != torch.float32 and has_float64(q.device) else torch.float32
    flat_out, codes = out.view(-1, k), q.codes.reshape(-1, q.codes.shape[-1])
    outer = None
    if q.tensor_scale is not None:
        outer = q.tensor_scale.expand(shape[:-1]).reshape(-1, 1)
    n = shape[-2] if len(shape) > 1 else 1
    scales = q.scales.reshape(-1, q.scales.shape[-1])
    step = max(CHUNK // max(k, 1), 1)
    for row in range(0, flat_out.shape[0], step):
        part = slice(row, min(row + step, flat_out.shape[0]))
        if height == 1:
            block_scales = scales[part]
        else:
            index = torch.arange(part.start, part.stop, device=q.device)
            block_scales = scales[index // n * -(-n // height) + index % n // height]
        values = decode(codes[part], fmt.element, k, work)
        whole = k // width * width
        for multiplier in scale_factors(block_scales, fmt, work):
            values[:, :whole].unflatten(1, (k // width, width)).mul_(multiplier[:, : k // width, None])
            if whole < k:
                values[:, whole:].mul_(multiplier[:, -1:])
        if outer is not None:
            values.mul_(outer[part])
        flat_out[part] = _to_odd(values) if work == torch.float64 != dtype else values
    return out


def _quantize_rows(x: Tensor, fmt: Format, rule: str, outer: Tensor | None) -> tuple[Tensor, Tensor]:
    """[n, k] float32 -> packed codes [n, bytes] and scales; n is whole blocks or the tensor's last rows."""
    (n, k), (height, width) = x.shape, fmt.block
    if n % height or k % width:
        x = torch.nn.functional.pad(x, (0, -k % width, 0, -n % height))
    tiles = x.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [n / height, height, k / width, width]
    amax = tiles.abs().amax(dim=(1, 3))
    if fmt.scale == "e8m0":
        scales = e8m0_from_amax(amax, fmt.element, rule)
        e = scales.to(torch.int32).sub_(127)
        # 2^-e in two factors, both normal numbers, so that no intermediate is flushed or rounded.
        half = e >> 1
        first, second = _exp2(-half), _exp2(half - e)
        scaled = (tiles * first[:, None, :, None]).mul_(second[:, None, :, None])
    elif fmt.scale == "e4m3":
        assert outer is not None
        scales = e4m3_from_amax(amax, outer[:, None], fmt.element)
        # Beside a tiny tensor scale the product may round to 0, and 0 / 0 is no code.
        step = (scale_value(scales, fmt) * outer[:, None]).clamp_(min=2.0**-149)
        scaled = tiles / step[:, None, :, None]
    else:
        scales = f32_from_amax(amax, fmt.element)
        scaled = tiles / scales[:, None, :, None]
    codes = encode(scaled, fmt.element).masked_fill_(~torch.isfinite(amax)[:, None, :, None], 0)
    codes = codes.flatten(2, 3).flatten(0, 1)[:n, :k]
    return pack_codes(codes, fmt.element.bits), scales


def _to_odd(x: Tensor) -> Tensor:
    """Cut float64 `x`, in place, to 13 significant bits, the last one set if any bit below it was.

    torch takes float64 to 16 bits by way of float32 and so rounds twice. What this leaves, float32 holds, and
    it rounds to 11 bits or fewer as `x` does.
    """
    below = (1 << 40) - 1
    bits = x.view(torch.int64)
    bits.bitwise_or_(bits.bitwise_and(below).add_(below)).bitwise_and_(~below)
    return x


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def _exp2(e: Tensor) -> Tensor:
    """2^e for int32 e in [-126, 127]."""
    return (e + 127).bitwise_left_shift_(23).view(torch.float32)


def _tensor_scale(
    x: Tensor, fmt: Format, given: Tensor | float | None, row_ranges: Sequence[int] | None
) -> Tensor:
    """NVFP4's outer multiplier, broadcastable to [..., N]; positive."""
    n = x.shape[-2] if x.dim() > 1 else 1
    if given is not None:
        if row_ranges is not None:
            raise FormatError("give tensor_scale or row_ranges, not both")
        scale = torch.as_tensor(given, dtype=torch.float32, device=x.device).detach()
        bad = scale[~((scale > 0) & torch.isfinite(scale))]
        if bad.numel():
            raise FormatError(f"tensor_scale must be positive and finite, found {bad[0].item()}")
        _expect_broadcast(scale, tuple(x.shape[:-1]))
        return scale
    if row_ranges is not None and (sum(row_ranges) != n or min(row_ranges, default=0) <= 0):
        raise FormatError(f"row_ranges {tuple(row_ranges)} do not divide {n} rows")
    # What is not finite (in float32) is marked by its own block's scale and must not touch the others.
    finite = (x.float() if x.dtype not in _NARROW else x).abs().nan_to_num_(0.0, 0.0)
    amax = finite.amax(dim=-1).float() if x.shape[-1] else x.new_zeros(x.shape[:-1], dtype=torch.float32)
    if x.dim() == 1:
        largest = amax
    elif row_ranges is None:
        largest = amax.amax(dim=-1, keepdim=True) if n else amax.new_zeros(*amax.shape[:-1], 1)
    else:
        parts = [p.amax(dim=-1, keepdim=True).expand(p.shape) for p in amax.split(list(row_ranges), dim=-1)]
        largest = torch.cat(parts, dim=-1)
    scale = divide(largest, E4M3.max * fmt.element.max)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _expect(what: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if t.dtype != dtype or tuple(t.shape) != shape:
        raise FormatError(f"{what}: expected {dtype} {shape}, found {t.dtype} {tuple(t.shape)}")


def _expect_broadcast(tensor_scale: Tensor, shape: tuple[int, ...]) -> None:
    try:
        tensor_scale.expand(shape)
    except RuntimeError:
        raise FormatError(f"tensor_scale {tuple(tensor_scale.shape)} does not broadcast to {shape}") from None
