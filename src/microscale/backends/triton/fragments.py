"""E2M1 weights as Hopper's matrix unit takes them from registers: the layout behind `hopper`, and the exact way back.

wgmma's register operand is 64 rows by 16 columns spread over 128 threads. A matrix is cut into tiles of 64 rows and
64 columns, and a thread's 32 codes of a tile are 16 bytes, the bytes of the threads one after the other: one load,
nothing moves between threads. Rows that are neighbours (2g, 2g + 1) lie in one thread, so that a gate meets its up.

A pair of 32-bit words holds 16 codes, as eight pairs of neighbours along K. Each pair becomes two bfloat16 in one
register by at most a shift and a mask: sign to bit 15, exponent and fraction to bits 8..6, which is the value times
2^-126 (the code of 0.5 is a bfloat16 subnormal). `PLACES` says which bit lies where:

    pairs 0..2 of word 0 and 1:  in place; 6 bits further down; rotated by 10
    pairs 6 and 7:               the four free bits of each half of word 0, and those of word 1, 2 bits further down

MXFP4's scales are bfloat16 exponents 126 higher than they should be, so that one product puts scale and 2^126 in.
NVFP4's stay E4M3 without the sign bit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from microscale.backends.triton import layout
from microscale.elements import pack_codes, unpack_codes
from microscale.formats import E2M1, Format
from microscale.quant import QuantTensor

ROWS = COLUMNS = 64
# What the product with NVFP4's scales leaves to the rows' factor: 2^126 times a scale would leave bfloat16.
NVFP4_REST = 2.0**16
_LOW, _HIGH = (6, 7, 8, 15), (22, 23, 24, 31)  # a code's four bits in a bfloat16 pair
_FREE = (3, 4, 10, 11)  # the bits of a half that pairs 0..2 leave


def _place(pair: int, bit: int) -> tuple[int, int]:
    """(word, bit) that holds what pair `pair` wants at bit `bit`."""
    if pair < 6:
        return pair // 3, (bit - (0, 6, 10)[pair % 3]) % 32
    bit = (bit - (2, 12)[pair - 6]) % 32
    return (0, bit) if bit % 16 in _FREE else (1, bit - 2)


def _places() -> tuple[tuple[int, int, int, int, int], ...]:
    """(pair, half, word, mask, shift): code & mask, shifted left by `shift`, belongs into the word."""
    found = []
    for pair in range(8):
        for half, bits in enumerate((_LOW, _HIGH)):
            groups: dict[tuple[int, int], int] = {}
            for i, bit in enumerate(bits):
                word, place = _place(pair, bit)
                groups[word, place - i] = groups.get((word, place - i), 0) | 1 << i
            found += [(pair, half, word, mask, shift) for (word, shift), mask in groups.items()]
    return tuple(found)


PLACES = _places()


@dataclass(frozen=True, eq=False)
class Fragments:
    """What `hopper`'s kernels read.

    Attributes:
        format, shape, rule: as in the `QuantTensor`, [N, K] or [E, N, K].
        codes: int32 [E, ceil(N / 64), ceil(K / 64), 512].
        scales: int32 [E, ceil(N / 64), ceil(K / 64), 32], NVFP4 64.
        row_scale: float32 [E, N], the tensor scale spread over rows times `NVFP4_REST`; None without one.
        tensor_scale: as it came, for `unpack`.
    """

    format: Format
    shape: tuple[int, ...]
    rule: str | None
    codes: Tensor
    scales: Tensor
    row_scale: Tensor | None
    tensor_scale: Tensor | None

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
        warnings.warn(
            f"{self.format.name} weights {self.shape} are kept a second time, in the layout of all GPUs: Hopper's own "
            "kernels want w13 and w2 both packed for them, and gates and ups that lie apart in multiples of 64 rows",
            stacklevel=2,
        )
        return layout.pack(unpack(self))


def suits(w: QuantTensor) -> bool:
    """Whether every weight is exact in this layout and rows of activations can be copied. Waits for the device."""
    if w.format.element is not E2M1 or w.shape[-1] % 32 or 0 in w.shape:
        return False
    # MXFP4: 2^(byte - 1) must be a finite bfloat16, and 255 is NaN; NVFP4: no sign, no NaN.
    return bool(w.scales.max() <= (128 if w.format.scale == "e8m0" else 126))


def pack(w: QuantTensor) -> Fragments:
    """[N, K] or [E, N, K] that `suits`, into tiles."""
    n, k = w.shape[-2:]
    experts = w.shape[0] if len(w.shape) == 3 else 1
    tiles, chunks = -(-n // ROWS), -(-k // COLUMNS)
    codes = torch.empty(experts, tiles, chunks, 512, dtype=torch.int32, device=w.device)
    words = 32 * 64 // (2 * w.format.block[1])
    scales = torch.empty(experts, tiles, chunks, words, dtype=torch.int32, device=w.device)
    for e, (c, s) in enumerate(
        zip(w.codes.reshape(experts, n, -1), w.scales.reshape(experts, n, -1), strict=True)
    ):
        for start in range(0, tiles, step := max(2**24 // (k * ROWS), 1)):
            rows = slice(start * ROWS, (start + step) * ROWS)
            part = unpack_codes(c[rows], 4, k)
            codes[e, start : start + step] = _code_words(_padded(part, ROWS, COLUMNS))
        scales[e] = _scale_words(_padded(s, ROWS, COLUMNS // w.format.block[1]), w.format)
    row_scale = None
    if w.tensor_scale is not None:
        row_scale = w.tensor_scale.expand(w.shape[:-1]).reshape(experts, n) * NVFP4_REST
    return Fragments(w.format, w.shape, w.rule, codes, scales, row_scale, w.tensor_scale)


def unpack(packed: Fragments) -> QuantTensor:
    """The exact inverse of `pack`."""
    (n, k), fmt = packed.shape[-2:], packed.format
    codes, scales = [], []
    for c, s in zip(packed.codes, packed.scales, strict=True):
        codes.append(pack_codes(_codes(c)[:n, :k].contiguous(), 4))
        scales.append(_scales(s, fmt)[:n, : -(-k // fmt.block[1])])
    shape = packed.shape[:-1]
    return QuantTensor(
        fmt,
        packed.shape,
        torch.stack(codes).view(*shape, -1),
        torch.stack(scales).reshape(*shape, -1),
        packed.tensor_scale,
        packed.rule,
    )


def _padded(t: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, -t.shape[1] % columns, 0, -t.shape[0] % rows))


# Rows of a tile are (warp, lane row g, odd), columns (half of 32, p; q; h; lane column t; odd).
_ROWS, _COLUMNS = (4, 8, 2), (2, 2, 2, 4, 2)


def _code_words(codes: Tensor) -> Tensor:
    """uint8 [tiles * 64, chunks * 64] -> int32 [tiles, chunks, 512]."""
    tiles, chunks = codes.shape[0] // ROWS, codes.shape[1] // COLUMNS
    c = codes.view(tiles, *_ROWS, chunks, *_COLUMNS)
    # -> tile, chunk, warp, g, t, p, then pair (q, h, odd row), half
    c = c.permute(0, 4, 1, 2, 8, 5, 6, 7, 3, 9).reshape(tiles, chunks, 4, 8, 4, 2, 8, 2).to(torch.int32)
    words = torch.zeros(*c.shape[:-2], 2, dtype=torch.int32, device=c.device)
    for pair, half, word, mask, shift in PLACES:
        words[..., word] |= _shifted(c[..., pair, half] & mask, shift)
    return words.view(tiles, chunks, 512)


def _codes(words: Tensor) -> Tensor:
    """The inverse: int32 [tiles, chunks, 512] -> uint8 [tiles * 64, chunks * 64]."""
    tiles, chunks = words.shape[:2]
    w = words.view(tiles, chunks, 4, 8, 4, 2, 2)
    c = torch.zeros(*w.shape[:-1], 8, 2, dtype=torch.uint8, device=w.device)
    for pair, half, word, mask, shift in PLACES:
        c[..., pair, half] |= (_shifted(w[..., word], -shift) & mask).to(torch.uint8)
    c = c.view(tiles, chunks, 4, 8, 4, 2, 2, 2, 2, 2)  # tile, chunk, warp, g, t, p, q, h, odd row, odd column
    return c.permute(0, 2, 3, 8, 1, 5, 6, 7, 4, 9).reshape(tiles * ROWS, chunks * COLUMNS)


def _scale_words(scales: Tensor, fmt: Format) -> Tensor:
    """uint8 [tiles * 64, blocks] -> int32 [tiles, chunks, 32 or 64]."""
    blocks = COLUMNS // fmt.block[1]
    s = scales.view(-1, *_ROWS, scales.shape[1] // blocks, blocks).to(torch.int32)
    s = s.permute(0, 4, 1, 2, 5, 3)  # tile, chunk, warp, g, block, odd row
    if fmt.scale == "e8m0":
        # Padding keeps its 0, and so a factor of 2^-1 on codes that are 0.
        pairs = (s[..., 0] + 126 << 7) | (s[..., 1] + 126 << 23)
        words = pairs[..., :1] | _rotated(pairs[..., 1:], -8)
    else:
        pairs = s[..., 0] << 4 | s[..., 1] << 20
        words = pairs[..., 0::2] | _rotated(pairs[..., 1::2], 7)
    return words.flatten(2)


def _scales(words: Tensor, fmt: Format) -> Tensor:
    """The inverse, uint8 [tiles * 64, blocks]."""
    tiles, chunks = words.shape[:2]
    w = words.view(tiles, chunks, 4, 8, -1)
    if fmt.scale == "e8m0":
        pairs = torch.cat((w, _rotated(w, 8)), -1)
        s = torch.stack(((pairs >> 7 & 255) - 126, (pairs >> 23 & 255) - 126), -1)
    else:
        pairs = torch.stack((w, _rotated(w, -7)), -1).flatten(-2)
        s = torch.stack((pairs >> 4 & 127, pairs >> 20 & 127), -1)
    return s.permute(0, 2, 3, 5, 1, 4).reshape(tiles * ROWS, -1).to(torch.uint8)


def _shifted(words: Tensor, shift: int) -> Tensor:
    return words << shift if shift >= 0 else words >> -shift


def _rotated(words: Tensor, left: int) -> Tensor:
    """int32, rotated left by `left` of -31..31 bits."""
    left %= 32
    return words << left | (words >> (32 - left) & (1 << left) - 1)
