"""Codes to the left operand of Hopper's matrix unit, in registers: `placement` says where the bits lie."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from microscale.backends.triton.placement import CHOSEN, LANDS, moves, sums, words

# Of 16 codes, pairs 0 to 7. The even ones belong to an even row, the odd ones to the row after it; the first four lie
# in the first half of 32 columns.
_PAIRS = "abcdefuv"
_SCALE_OF = ("even0", "odd0") * 2 + ("even1", "odd1") * 2

# A word of scales has one for an even row and one for the odd row after it.
_SPREAD = """
mov.b32 {p, q}, s;
mov.b32 even0, {p, p};
mov.b32 odd0, {q, q};
mov.b32 {p, q}, t;
mov.b32 even1, {p, p};
mov.b32 odd1, {q, q};
"""
# E8M0: the word is two bfloat16 as it is, for both halves of the 32 columns.
_E8M0 = "mov.b32 s, {0};\nmov.b32 t, {0};\n"
# Eight bits of a bfloat16 for either half, see `fragments._e4m3_fields`.
_E4M3 = """
.reg .b32 same;
mov.b32 same, 0x70007000;
shf.l.wrap.b32 t, {0}, {0}, 8;
lop3.b32 s, {0}, 0x0FF00FF0, same, 0xEA;
lop3.b32 t, t, 0x0FF00FF0, same, 0xEA;
"""


# What INT8's codes are too large by, times the scale: 128 times 2^-133 is 2^-126. For even rows x, for odd rows y.
_OFFSET = """
.reg .b32 x, y, offset;
mov.b32 offset, 0x80808080;
mul.rn.bf16x2 x, s, offset;
mov.b32 {p, q}, x;
mov.b32 x, {p, p};
mov.b32 y, {q, q};
"""


def _joined(element: str, given: list[str]) -> list[str]:
    """Instructions that make the joined word j, where there is one."""
    if sums(element):
        return [f"mad.lo.u32 j, {given[1]}, 4, {given[0]};"]
    if words(element) == 4:
        return []
    return [f"shl.b32 j, {given[1]}, 2;", f"lop3.b32 j, {CHOSEN:#x}, {given[0]}, j, 0xCA;"]


def _unpacking(element: str, given: list[str]) -> str:
    """Instructions that bring eight pairs into a, b, ... v; `given` are the registers of the group's words."""
    lines = _joined(element, given)
    for name, (shifts, mask) in zip(_PAIRS, moves(element), strict=True):
        sources = []
        for shift, moved in zip(shifts, (name, "z"), strict=False):
            source = [*given, "j"][shift.word]
            if shift.left and shift.wraps:
                lines.append(f"shf.l.wrap.b32 {moved}, {source}, {source}, {shift.left};")
            elif shift.left:
                lines.append(f"shl.b32 {moved}, {source}, {shift.left};")
            sources.append(moved if shift.left else source)
        if len(sources) == 2:
            lines.append(f"lop3.b32 {name}, {', '.join(sources)}, {mask:#x}, 0x28;")
        else:
            lines.append(f"and.b32 {name}, {sources[0]}, {mask:#x};")
    return "\n".join(lines) + "\n"


def _text(element: str, scale: str) -> str:
    """Inline assembly of a group of 16 codes. $0 to $7 are its results; then come two registers of each operand."""
    count = words(element)
    given = ["$8", "$9", "$10", "$11"][:count]
    spread = (_E4M3 if scale == "e4m3" else _E8M0).format("$10" if count == 2 else "$12")
    lines = [
        "{",
        ".reg .b32 a, b, c, d, e, f, u, v, j, z, s, t, even0, odd0, even1, odd1;",
        ".reg .b16 p, q;",
    ]
    lines += [_unpacking(element, given), spread, _SPREAD]
    if element == "int8":
        lines.append(_OFFSET)
        lines += [f"fma.rn.bf16x2 ${i}, {_PAIRS[i]}, {_SCALE_OF[i]}, {'xy'[i % 2]};" for i in range(8)]
    else:
        lines += [f"mul.rn.bf16x2 ${i}, {_PAIRS[i]}, {_SCALE_OF[i]};" for i in range(8)]
    return "\n".join([*lines, "}"])


_ASSEMBLY = {
    **{(element, "e8m0"): _text(element, "e8m0") for element in LANDS},
    ("e2m1", "e4m3"): _text("e2m1", "e4m3"),
    ("e4m3", "f32"): _text("e4m3", "f32"),
}
_BITS = {element: len(lands) for element, lands in LANDS.items()}


def assembly(element: str, scale: str) -> tuple[str, int]:
    """The instructions that decode a group of 16 codes, and how many words of codes they take."""
    return _ASSEMBLY[element, scale], words(element)


@gluon.constexpr_function
def _assembly(ELEMENT, SCALE):
    return _ASSEMBLY[ELEMENT, SCALE]


@gluon.constexpr_function
def _constraints(ELEMENT, SCALE):
    operands = (_BITS[ELEMENT] > 4) + 2
    return ",".join(["=r"] * 8 + ["r"] * (2 * operands))


@gluon.constexpr_function
def bits_of(ELEMENT):
    return _BITS[ELEMENT]


@gluon.constexpr_function
def _bases(size, first):
    """Of `size` copies, `first` elements apart."""
    return [first << i for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def words_layout(T, C, WARPS, ROWS, WIDTH):
    """Words as threads hold them, [T * C * ROWS, WIDTH]; of 256 rows of a tile each thread has two."""
    chunk, tile = _bases(C, ROWS), _bases(T, ROWS * C)
    split = (WARPS // 4).bit_length() - 1
    return gl.DistributedLinearLayout(
        [[0, b] for b in _bases(WIDTH, 1)]
        + [[b, 0] for b in _bases(ROWS // 128, 128) + chunk + tile[split:]],
        [[1 << i, 0] for i in range(5)],
        [[32, 0], [64, 0]] + [[b, 0] for b in tile[:split]],
        [],
        [T * C * ROWS, WIDTH],
    )


@gluon.constexpr_function
def groups_layout(T, C, WARPS):
    """The same for groups of codes: [T * C * 32, 4, 2, 2], of lane rows g, columns t, halves p, two words."""
    chunk, tile = _bases(C, 32), _bases(T, 32 * C)
    split = (WARPS // 4).bit_length() - 1
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 1, 0]] + [[b, 0, 0, 0] for b in chunk + tile[split:]],
        [[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]],
        [[8, 0, 0, 0], [16, 0, 0, 0]] + [[b, 0, 0, 0] for b in tile[:split]],
        [],
        [T * C * 32, 4, 2, 2],
    )


@gluon.constexpr_function
def scales_layout(T, C, WARPS, WORDS):
    """Scale words [T * C * 32 * WORDS] as threads need them, the four of a lane row the same."""
    split = (WARPS // 4).bit_length() - 1
    tile = _bases(T, 32 * WORDS * C)
    return gl.DistributedLinearLayout(
        [[b] for b in _bases(WORDS, 1) + _bases(C, 32 * WORDS) + tile[split:]],
        [[0], [0], [WORDS], [2 * WORDS], [4 * WORDS]],
        [[8 * WORDS], [16 * WORDS]] + [[b] for b in tile[:split]],
        [],
        [T * C * 32 * WORDS],
    )


@gluon.constexpr_function
def accumulator(BLOCK_M, WARPS):
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])


@gluon.constexpr_function
def store_layout(ROWS, TOKENS, WARPS):
    """[ROWS, TOKENS], rows fastest: 4 of a thread, or 8 where that leaves none without."""
    each = 8 if TOKENS >= 32 else 4
    lanes = min(ROWS // each, 32)
    return gl.BlockedLayout([each, 1], [lanes, 32 // lanes], [1, WARPS], [0, 1])


@gluon.jit
def _halves(scale_words, T: gl.constexpr, C: gl.constexpr, SCALE: gl.constexpr):
    """Scale words [T * C * 32, 4, 2, 2] of each group."""
    WIDE: gl.constexpr = groups_layout(T, C, gl.num_warps())
    if SCALE != "e4m3":
        first = scale_words & 0x7F807F80
        second = ((scale_words << 8) | ((scale_words >> 24) & 0xFF)) & 0x7F807F80
    else:
        first, second = scale_words.reshape([T * C * 32, 2]).split()
    WORD: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WIDE)))
    first = gl.convert_layout(first, WORD, assert_trivial=True)[:, None, None, None]
    second = gl.convert_layout(second, WORD, assert_trivial=True)[:, None, None, None]
    # The comparison is about register numbers, so the compiler decides it.
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WIDE))))[None, None, :, None]
    return gl.where(half == 0, first, second)


@gluon.jit
def _piece(groups, PIECE: gl.constexpr, PIECES: gl.constexpr, T: gl.constexpr, C: gl.constexpr):
    """Of groups [T * C * 32, 4, 2, 2] those of one of PIECES equal parts of the columns: 1, 2, C or 2 C."""
    if PIECES == 2 * C:
        first, second = groups.permute([0, 1, 3, 2]).split()
        groups = first if PIECE % 2 == 0 else second
    if PIECES > 1 and C > 1:
        CHUNK: gl.constexpr = PIECE * C // PIECES
        first, second = (
            groups.reshape([T, 2, C * 16, groups.numel // (T * C * 32)]).permute([0, 2, 3, 1]).split()
        )
        groups = first if CHUNK * 2 // C == 0 else second
        if C == 4 and PIECES >= 4:
            first, second = groups.reshape([T, 2, 32, groups.numel // (T * 64)]).permute([0, 2, 3, 1]).split()
            groups = first if CHUNK % 2 == 0 else second
    return groups


@gluon.jit
def decode(
    words, more, scale_words, PIECE: gl.constexpr, PIECES: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """Codes and their scale words -> bfloat16 [T * 64, C * 64], slots of rows, or a piece of its columns.

    Returns:
        Of each 32 columns the first 16, and the others, with dimensions as threads hold them: see `operand`.

    Args:
        words: int32 [T * C * 128, 4], of 8 bits [T * C * 256, 4]; more: of 6 bits [T * C * 128, 2].
        scale_words: [T * C * 32], NVFP4 [T * C * 64].
    """
    WIDE: gl.constexpr = groups_layout(T, C, gl.num_warps())
    BITS: gl.constexpr = bits_of(ELEMENT)
    if BITS == 8:
        # tile and chunk, p, g, t, word -> g, t, p, word % 2, word // 2
        w = words.reshape([T * C, 2, 32, 4, 2, 2]).permute([0, 2, 3, 1, 5, 4])
        first, second = w.reshape([T * C * 32, 4, 2, 2, 2]).split()
        first = gl.convert_layout(first, WIDE, assert_trivial=True)
        second = gl.convert_layout(second, WIDE, assert_trivial=True)
    else:
        first = gl.convert_layout(words.reshape([T * C * 32, 4, 2, 2]), WIDE, assert_trivial=True)
        second = first
        if BITS == 6:
            second = gl.convert_layout(
                more.reshape([T * C * 32, 4, 2]), gl.SliceLayout(3, WIDE), assert_trivial=True
            )
            first, second = gl.broadcast(first, second[:, :, :, None])
    first, s = gl.broadcast(first, _halves(scale_words, T, C, SCALE))
    if BITS == 4:
        given = [_piece(first, PIECE, PIECES, T, C), _piece(s, PIECE, PIECES, T, C)]
    else:
        given = [
            _piece(first, PIECE, PIECES, T, C),
            _piece(second, PIECE, PIECES, T, C),
            _piece(s, PIECE, PIECES, T, C),
        ]
    o = gl.inline_asm_elementwise(
        _assembly(ELEMENT, SCALE), _constraints(ELEMENT, SCALE), given,
        dtype=(gl.bfloat16,) * 8, is_pure=True, pack=2,
    )  # fmt: skip
    low = gl.join(gl.join(o[0], o[1]), gl.join(o[2], o[3]))
    high = gl.join(gl.join(o[4], o[5]), gl.join(o[6], o[7]))
    return low, high


@gluon.jit
def operand(
    weights, PIECE: gl.constexpr, PIECES: gl.constexpr, ACC: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """`decode` of (codes, their further bits, scales), as the matrix unit takes it."""
    words, more, scale = weights
    low, high = decode(words, more, scale, PIECE, PIECES, T, C, ELEMENT, SCALE)
    # A piece of 32 columns is one of a chunk's two p.
    P: gl.constexpr = 1 if PIECES == 2 * C else 2
    CHUNKS: gl.constexpr = 2 * C // PIECES // P
    a = gl.join(low, high).reshape([T, CHUNKS, 4, 8, 4, P, 2, 2, 2, 2])
    # tile, chunk, warp, g, t, p, odd column; odd row, h, q -> tile, warp, odd row, g; chunk, p, q, h, t, odd column
    a = a.permute([0, 2, 7, 3, 1, 5, 9, 8, 4, 6]).reshape([T * 64, CHUNKS * P * 32])
    return gl.convert_layout(a, gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)


@gluon.jit
def _half(columns, ACC: gl.constexpr, T: gl.constexpr):
    """16 columns as the matrix unit takes them."""
    # tile, warp, g, t, odd column; odd row, h -> tile, warp, odd row, g; h, t, odd column
    a = columns.reshape([T, 4, 8, 4, 2, 2, 2]).permute([0, 1, 5, 2, 6, 3, 4]).reshape([T * 64, 16])
    return gl.convert_layout(a, gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)


@gluon.jit
def operands(
    weights, PIECE: gl.constexpr, PIECES: gl.constexpr, ACC: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """Tuple of `operand`'s columns: of a piece of 32, two for one instruction each."""
    if PIECES == 2 * C:
        words, more, scale = weights
        low, high = decode(words, more, scale, PIECE, PIECES, T, C, ELEMENT, SCALE)
        return (_half(low, ACC, T), _half(high, ACC, T))
    else:
        return (operand(weights, PIECE, PIECES, ACC, T, C, ELEMENT, SCALE),)


@gluon.jit
def slots(first, second, T: gl.constexpr, LAYOUT: gl.constexpr):
    """The rows of the matrix that the slots of a program's tiles are for."""
    i = gl.arange(0, T * 64, LAYOUT)
    tile = i // 64
    if T > 1:
        tile = gl.where(tile < T // 2, first + tile, second + tile - T // 2)
    else:
        tile = first + tile
    # A tile's slots are (warp, odd row, g), its rows (warp, g, odd row).
    return tile * 64 + i % 64 // 16 * 16 + i % 8 * 2 + i // 8 % 2


@gluon.jit
def factors(row_scale, bias, rows, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr):
    """What sums of these rows are multiplied by, and what comes to them; anything where there is none."""
    scale, shift = rows, rows
    if ROW_SCALE:
        scale = gl.load(row_scale + rows)
    if HAS_BIAS:
        shift = gl.load(bias + rows)
    return scale, shift


@gluon.jit
def applied(acc, given, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Sums with the `factors` of their rows."""
    scale, shift = given
    if ROW_SCALE:
        acc = acc * scale[:, None]
    if HAS_BIAS:
        acc = acc + shift.to(gl.float32)[:, None]
    return acc


@gluon.jit
def finish(acc, row_scale, bias, rows, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr):
    """As `gemm.scaled`."""
    return applied(acc, factors(row_scale, bias, rows, ROW_SCALE, HAS_BIAS), ROW_SCALE, HAS_BIAS)


@gluon.jit
def in_order(acc, T: gl.constexpr, BLOCK_M: gl.constexpr):
    """Slots to rows; within a thread."""
    return acc.reshape([T * 4, 2, 8, BLOCK_M]).permute([0, 2, 1, 3]).reshape([T * 64, BLOCK_M])
