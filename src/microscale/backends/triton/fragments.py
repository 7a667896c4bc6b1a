"""Weights as Hopper's matrix unit takes them from registers: the layout behind `hopper`, and the exact way back.

wgmma's register operand is 64 rows by 16 columns spread over 128 threads. A matrix is cut into tiles of 64 rows and
64 columns, and a thread's 32 codes of a tile are its own 16, 24 or 32 bytes: nothing moves between threads. 16 bytes
of each thread lie one after the other, so that a load is as wide as it gets. Rows that are neighbours (2g, 2g + 1) lie
in one thread, so that a gate meets its up. `placement` says which bit is where.

MX scales are bfloat16 exponents that have what the elements miss besides (4 bits: 2^126), so that one product puts both
in. NVFP4's are eight bits of such a bfloat16, the others of which are always the same. Of block FP8's, which are
float32, the power of two goes in like an MX scale, and what is left, 1 to 2, waits for the sums: see `ratios`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from microscale.backends.triton import layout
from microscale.backends.triton.placement import FREE, changes, sums, taken, words
from microscale.elements import pack_codes, unpack_codes
from microscale.formats import Element, Format
from microscale.quant import CHUNK, QuantTensor

ROWS = COLUMNS = 64
# What the product with NVFP4's scales leaves to the rows' factor, since 2^126 times a scale would leave bfloat16, and
# the product with INT8's.
ROWS_REST = 2.0**16
INT8_BYTES = 16, 143  # of scales, with which INT8's products are exact
_AT_ONCE = 2**24  # codes that are packed together


@dataclass(frozen=True, eq=False)
class Fragments:
    """What `hopper`'s kernels read.

    Attributes:
        format, shape, rule: as in the `QuantTensor`, [N, K] or [E, N, K].
        codes: int32 [E, ceil(N / 64), ceil(K / 64), 128 * bits of a code].
        scales: int32 [E, ceil(N / 64), ceil(K / 64), 32], NVFP4 64.
        ratios: float32 [E, ceil(N / 128), ceil(K / 128) + 1], of block FP8: what the sums so far are multiplied by
            before each block of columns, and at the end, so that they are always in units of the block's rest of the
            scale; None elsewhere.
        row_scale: float32 [E, N], the tensor scale spread over rows times `ROWS_REST`, or for INT8 that alone; None
            elsewhere.
        tensor_scale, block_scales: as they came, for `unpack`; None where there are none.
        unscaled: of NVFP4, blocks whose scale is 0, which no factor of the kernel's is, and whose codes are not: their
            places among all, and these codes for `unpack`, uint8 [., 8]; `codes` has zeros there. None without any.
    """

    format: Format
    shape: tuple[int, ...]
    rule: str | None
    codes: Tensor
    scales: Tensor
    row_scale: Tensor | None
    tensor_scale: Tensor | None
    ratios: Tensor | None = None
    block_scales: Tensor | None = None
    unscaled: tuple[Tensor, Tensor] | None = None

    @property
    def tiles(self) -> int:
        """Tiles of 64 rows in a matrix."""
        return self.codes.shape[1]

    @property
    def chunks(self) -> int:
        """Tiles of 64 columns in a row."""
        return self.codes.shape[2]

    @cached_property
    def plain(self) -> layout.Packed:
        """For the kernels of every target, where `hopper_moe` refuses. Kept, so these weights are in memory twice."""
        why = (
            "Hopper's own kernels want w13 and w2 both packed for them, and gates and ups that lie apart in multiples "
            "of 64 rows"
        )
        return layout.pack_again(unpack(self), why)


def suits(w: QuantTensor) -> bool:
    """Whether every weight is exact in this layout and rows of activations can be copied. Waits for the device."""
    if w.shape[-1] % 32 or 0 in w.shape:
        return False
    if w.format.scale == "f32":
        # Zeros and NaNs have their place, and a scale far from 1 would leave bfloat16 no room for the element.
        least, greatest = layout.exponent_range(w.format.element, torch.bfloat16)
        size = w.scales.abs()
        there = (size == 0) | size.isnan() | (size >= 2.0 ** (least - 127)) & (size < 2.0 ** (greatest - 126))
        return bool(there.all()) and not _has_specials(w)
    if w.format.scale == "e4m3":  # no sign, no NaN
        return bool(w.scales.max() <= 126)
    if w.format.scale == "e8m0":
        least, greatest = scale_bytes(w.format.element)
        if bool(w.scales.max() > greatest) or bool((_exponents(w.scales, w.format.element) == 255).any()):
            return False
        if least and layout.scale_range(w)[0] < least:
            return False
    return not _has_specials(w)


def scale_bytes(element: Element) -> tuple[int, int]:
    """The E8M0 bytes, both included, with which every code has its exact place in this layout."""
    return layout.exponent_range(element, torch.bfloat16) if element.exponent_bits else INT8_BYTES


def _has_specials(w: QuantTensor) -> bool:
    """Infinities and NaNs among 8-bit codes, whose decoding does not look for them."""
    what = layout.specials(w.format.element)
    if what not in ("ieee", "nan"):
        return False
    codes = w.codes.reshape(-1)
    # Compared after a shift, which drops the sign.
    least = (0x7C if what == "ieee" else 0x7F) << 1
    return any(bool(((part << 1) >= least).any()) for part in codes.split(CHUNK * 64))


def pack(w: QuantTensor) -> Fragments:
    """[N, K] or [E, N, K] that `suits`, into tiles."""
    fmt, (n, k) = w.format, w.shape[-2:]
    experts = w.shape[0] if len(w.shape) == 3 else 1
    tiles, chunks, bits = -(-n // ROWS), -(-k // COLUMNS), fmt.element.bits
    codes = torch.empty(experts, tiles, chunks, 128 * bits, dtype=torch.int32, device=w.device)
    scales = w.scales.reshape(experts, *w.scales.shape[-2:])
    count = 64 if fmt.scale == "e4m3" else 32
    packed = torch.empty(experts, tiles, chunks, count, dtype=torch.int32, device=w.device)
    ratios = None
    if fmt.scale == "f32":
        rest, powers = _split(scales, fmt.element)
        ratios = torch.cat(
            (torch.ones_like(rest[..., :1]), rest[..., :-1] / rest[..., 1:], rest[..., -1:]), -1
        )
    whole, unscaled = w.codes.reshape(experts, n, -1), None
    if fmt.scale == "e4m3":
        whole, unscaled = _scaled_only(whole, scales)
    # A part at a time, since codes take 8 times as much on their way; of many experts, since each part is a hundred
    # small kernels, which the host takes longer to launch than the device to run.
    height, count = max(_AT_ONCE // (k * ROWS), 1), max(_AT_ONCE // (k * n), 1)
    for e in range(0, experts, count):
        some = slice(e, e + count)
        for start in range(0, tiles, height):
            rows = whole[some, start * ROWS : (start + height) * ROWS]
            part = unpack_codes(rows.reshape(-1, rows.shape[2]), bits, k).view(*rows.shape[:2], k)
            codes[some, start : start + height] = _tiled(part, COLUMNS, lambda t: _code_words(t, fmt.element))
        if fmt.scale == "f32":
            # Two tiles of rows and two of columns share one, and the words of each have it for all of their rows.
            spread = powers[some].repeat_interleave(2, 1)[:, :tiles].repeat_interleave(2, 2)[:, :, :chunks]
            packed[some] = spread[..., None]
        else:
            packed[some] = _tiled(scales[some], COLUMNS // fmt.block[1], lambda t: _scale_words(t, fmt))
    row_scale = None
    if fmt.element.exponent_bits == 0:
        row_scale = torch.full((experts, n), ROWS_REST, device=w.device)
    elif w.tensor_scale is not None:
        row_scale = w.tensor_scale.expand(w.shape[:-1]).reshape(experts, n) * ROWS_REST
    given = scales.contiguous() if fmt.scale == "f32" else None
    return Fragments(fmt, w.shape, w.rule, codes, packed, row_scale, w.tensor_scale, ratios, given, unscaled)


def _scaled_only(codes: Tensor, scales: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """NVFP4's codes with zeros of the same sign where the scale is 0, and `Fragments.unscaled`."""
    blocks, which = codes.reshape(scales.numel(), -1), (scales.flatten() == 0).nonzero().flatten()
    which = which[(blocks[which] & 0x77 != 0).any(1)]
    if which.numel() == 0:
        return codes, None
    there = blocks[which]
    return blocks.index_put((which,), there & 0x88).view(codes.shape), (which, there)


def _split(scales: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    """Float32 scales as a power of two times a rest: the rest, 1 to 2 or its negative, and E8M0's words of the power.

    The power of a zero is the word 0, which multiplies by 0, and its rest is 1; the rest of a NaN is NaN.
    """
    mantissa, exponent = torch.frexp(scales)  # 0.5 to 1
    usual = scales.isfinite() & (scales != 0)
    rest = torch.where(usual, mantissa * 2, torch.where(scales == 0, 1.0, scales))
    field = torch.where(usual, _exponents((exponent + 126).clamp(0, 255).to(torch.uint8), element), 0)
    return rest, field * 0x00800080 | _rotated(field * 0x00800080, -8)


def unpack(packed: Fragments) -> QuantTensor:
    """The exact inverse of `pack`."""
    (n, k), fmt = packed.shape[-2:], packed.format
    codes, scales = [], []
    held = packed.scales if packed.block_scales is None else packed.block_scales
    for c, s in zip(packed.codes, held, strict=True):
        codes.append(pack_codes(_codes(c, fmt.element)[:n, :k].contiguous(), fmt.element.bits))
        scales.append(s if fmt.scale == "f32" else _scales(s, fmt)[:n, : -(-k // fmt.block[1])])
    shape, whole = packed.shape[:-2], torch.stack(codes)
    if packed.unscaled is not None:
        which, there = packed.unscaled
        whole.view(-1, there.shape[1])[which] = there
    return QuantTensor(
        fmt,
        packed.shape,
        whole.view(*shape, n, -1),
        torch.stack(scales).reshape(*shape, *fmt.scale_shape(n, k)),
        packed.tensor_scale,
        packed.rule,
    )


def _tiled(t: Tensor, columns: int, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """[E, rows, K] -> [E, tiles, chunks, words], each expert's last tile and chunk filled with zeros; a chunk has so
    many of these columns."""
    t = torch.nn.functional.pad(t, (0, -t.shape[2] % columns, 0, -t.shape[1] % ROWS))
    words = pack(t.flatten(0, 1))
    return words.view(t.shape[0], -1, *words.shape[1:])


# Rows of a tile are (warp, lane row g, odd), columns (half of 32, p; q; h; lane column t; odd).
_ROWS, _COLUMNS = (4, 8, 2), (2, 2, 2, 4, 2)


def _code_words(codes: Tensor, element: Element) -> Tensor:
    """uint8 [tiles * 64, chunks * 64] -> int32 [tiles, chunks, 128 * bits]."""
    tiles, chunks, count = codes.shape[0] // ROWS, codes.shape[1] // COLUMNS, words(element.name)
    c = codes.view(tiles, *_ROWS, chunks, *_COLUMNS)
    # -> tile, chunk, warp, g, t, p, then pair (q, h, odd row), half
    c = c.permute(0, 4, 1, 2, 8, 5, 6, 7, 3, 9).reshape(tiles, chunks, 4, 8, 4, 2, 8, 2).to(torch.int32)
    table = _table(element).to(c.device)
    held = [torch.zeros(c.shape[:-2], dtype=torch.int32, device=c.device) for _ in range(table.shape[1])]
    for i, code in enumerate((c ^ _offset(element)).flatten(-2).unbind(-1)):
        for word in _changed(element)[i]:
            held[word] ^= table[i, word][code]
    w = torch.stack(_settled(*held) if sums(element.name) else held, -1)
    if count == 4:  # of each thread the words of p = 0, then those of p = 1
        return w.movedim(5, 2).reshape(tiles, chunks, -1)
    # Two words of each p of each thread; then of 6 bits the third ones.
    return torch.cat((w[..., :2].flatten(2), w[..., 2:].flatten(2)), 2)


def _offset(element: Element) -> int:
    """What codes are kept plus, as bits."""
    return 0 if element.exponent_bits else 128


@cache
def _table(element: Element) -> Tensor:
    """int32 [16, words, codes there are]: what each code of a group, pair by pair, changes in the group's words."""
    changed = torch.tensor(changes(element.name)).to(torch.int32).view(16, element.bits, -1)
    table = torch.zeros(16, changed.shape[2], 1, dtype=torch.int32)
    for i in range(element.bits):
        table = torch.cat((table, table ^ changed[:, i, :, None]), 2)
    return table


@cache
def _changed(element: Element) -> tuple[tuple[int, ...], ...]:
    """Which words that is, of each code of a group."""
    return tuple(tuple(some.any(1).nonzero().flatten().tolist()) for some in _table(element).bool())


def _settled(first: Tensor, second: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of 4 bits: what there is of them, with the bits that are free, so that their sum has what it shall."""
    for start in FREE:
        free = (wanted >> start) - (first + (second << 2) >> start)
        first, second = first | (free & 3) << start, second | (free >> 2 & 3) << start
    return first, second


def _codes(packed: Tensor, element: Element) -> Tensor:
    """The inverse: int32 [tiles, chunks, 128 * bits] -> uint8 [tiles * 64, chunks * 64]."""
    tiles, chunks = packed.shape[:2]
    if words(element.name) == 4:
        w = packed.view(tiles, chunks, 2, 4, 8, 4, 4).movedim(2, 5)
    else:
        parts = (
            packed[..., :512].unflatten(2, (4, 8, 4, 2, 2)),
            packed[..., 512:].unflatten(2, (4, 8, 4, 2, -1)),
        )
        w = torch.cat(parts, -1)
    held = [*w.unbind(-1)]
    if sums(element.name):
        held.append(held[0] + (held[1] << 2))
    c = torch.zeros(*w.shape[:-1], 8, 2, dtype=torch.uint8, device=w.device)
    for pair, half, word, mask, shift in taken(element.name):
        c[..., pair, half] ^= (_shifted(held[word], -shift) & mask).to(torch.uint8)
    # tile, chunk, warp, g, t, p, q, h, odd row, odd column
    c = (c ^ _offset(element)).view(tiles, chunks, 4, 8, 4, 2, 2, 2, 2, 2)
    return c.permute(0, 2, 3, 8, 1, 5, 6, 7, 4, 9).reshape(tiles * ROWS, chunks * COLUMNS)


def _exponents(scales: Tensor, element: Element) -> Tensor:
    """int32: E8M0 bytes as exponent fields of the bfloat16 that codes are multiplied with.

    Only the bytes of zero blocks may leave 1..254; they come around at the top, and multiply 0.
    """
    missing = 127 - element.bias if element.exponent_bits else 127 - INT8_BYTES[0]
    return scales.to(torch.int32) + missing & 255


@cache
def _e4m3_fields() -> Tensor:
    """int32 [127]: of E4M3 bytes without a sign eight bits of the bfloat16 that codes are multiplied with, ascending.

    That is the scale times 2^126, which codes miss, but for `ROWS_REST`: 0x7000 and these bits times 16. Not of a
    scale of 0, whose bits are 0: see `Fragments.unscaled`.
    """
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.bfloat16)
    return (scales * (2.0**126 / ROWS_REST)).view(torch.int16).to(torch.int32) >> 4 & 255


def _scale_words(scales: Tensor, fmt: Format) -> Tensor:
    """uint8 [tiles * 64, blocks] -> int32 [tiles, chunks, 32 or 64]."""
    blocks = COLUMNS // fmt.block[1]
    s = scales.view(-1, *_ROWS, scales.shape[1] // blocks, blocks).to(torch.int32)
    s = s.permute(0, 4, 1, 2, 5, 3)  # tile, chunk, warp, g, block, odd row
    if fmt.scale == "e8m0":
        # Padding keeps its 0, and so some factor on codes that are 0.
        s = _exponents(s, fmt.element)
        pairs = s[..., 0] << 7 | s[..., 1] << 23
        packed = pairs[..., :1] | _rotated(pairs[..., 1:], -8)
    else:
        s = _e4m3_fields().to(s.device)[s]
        pairs = s[..., 0] << 4 | s[..., 1] << 20
        packed = pairs[..., 0::2] | _rotated(pairs[..., 1::2], -8)
    return packed.flatten(2)


def _scales(packed: Tensor, fmt: Format) -> Tensor:
    """The inverse, uint8 [tiles * 64, blocks]."""
    tiles, chunks = packed.shape[:2]
    w = packed.view(tiles, chunks, 4, 8, -1)
    if fmt.scale == "e8m0":
        pairs = torch.cat((w, _rotated(w, 8)), -1)
        s = torch.stack((pairs >> 7 & 255, pairs >> 23 & 255), -1)
        s = s - int(_exponents(torch.zeros((), dtype=torch.uint8), fmt.element)) & 255
    else:
        pairs = torch.stack((w, _rotated(w, 8)), -1).flatten(-2)
        fields = torch.stack((pairs >> 4 & 255, pairs >> 20 & 255), -1)
        s = torch.searchsorted(_e4m3_fields().to(w.device), fields, out_int32=True)
    return s.permute(0, 2, 3, 5, 1, 4).reshape(tiles * ROWS, -1).to(torch.uint8)


def _shifted(w: Tensor, shift: int) -> Tensor:
    return w << shift if shift >= 0 else w >> -shift


def _rotated(w: Tensor, left: int) -> Tensor:
    """int32, rotated left by `left` of -31..31 bits."""
    left %= 32
    return w << left | (w >> (32 - left) & (1 << left) - 1)
