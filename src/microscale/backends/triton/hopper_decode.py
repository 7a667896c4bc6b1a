"""Codes to the left operand of Hopper's matrix unit, in registers: `fragments` says where the bits lie."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# $8 and $9 are the two words of codes, $10 a word of scales.
_UNPACK = """
{
.reg .b32 a, b, c, d, e, f, z, u, v, s, t;
shl.b32 b, $8, 6;
shf.l.wrap.b32 c, $8, $8, 10;
shl.b32 e, $9, 6;
shf.l.wrap.b32 f, $9, $9, 10;
shl.b32 z, $9, 2;
lop3.b32 z, 0x0C180C18, $8, z, 0xCA;
shl.b32 u, z, 2;
shf.l.wrap.b32 v, z, z, 12;
and.b32 a, $8, 0x81C081C0;
and.b32 b, b, 0x81C081C0;
and.b32 c, c, 0x81C081C0;
and.b32 d, $9, 0x81C081C0;
and.b32 e, e, 0x81C081C0;
and.b32 f, f, 0x81C081C0;
and.b32 u, u, 0x81C081C0;
and.b32 v, v, 0x81C081C0;
"""
# Pairs alternate between an even and an odd row, and rows between the halves of a scale word.
_SCALE = """
.reg .b16 p, q;
.reg .b32 even0, odd0, even1, odd1;
mov.b32 {p, q}, s;
mov.b32 even0, {p, p};
mov.b32 odd0, {q, q};
mov.b32 {p, q}, t;
mov.b32 even1, {p, p};
mov.b32 odd1, {q, q};
mul.rn.bf16x2 $0, a, even0;
mul.rn.bf16x2 $1, b, odd0;
mul.rn.bf16x2 $2, c, even0;
mul.rn.bf16x2 $3, d, odd0;
mul.rn.bf16x2 $4, e, even1;
mul.rn.bf16x2 $5, f, odd1;
mul.rn.bf16x2 $6, u, even1;
mul.rn.bf16x2 $7, v, odd1;
}
"""
# E8M0: the word is two bfloat16 as it is, for both halves of the 32 columns.
_E8M0 = "mov.b32 s, $10;\nmov.b32 t, $10;\n"
# E4M3 in place of a bfloat16's exponent and fraction is its value times 2^-120, subnormals included: times 2^120 it is
# exact, and times 2^110 it has what codes miss but for `fragments.NVFP4_REST`.
_E4M3 = """
.reg .b32 big, rest;
mov.b32 big, 0x7B807B80;
mov.b32 rest, 0x76807680;
and.b32 s, $10, 0x07F007F0;
shf.r.wrap.b32 t, $10, $10, 7;
and.b32 t, t, 0x07F007F0;
mul.rn.bf16x2 s, s, big;
mul.rn.bf16x2 t, t, big;
mul.rn.bf16x2 s, s, rest;
mul.rn.bf16x2 t, t, rest;
"""
_ASSEMBLY = {"e8m0": _UNPACK + _E8M0 + _SCALE, "e4m3": _UNPACK + _E4M3 + _SCALE}


@gluon.constexpr_function
def _assembly(SCALE):
    return _ASSEMBLY[SCALE]


@gluon.constexpr_function
def _bases(size, first):
    """Of `size` copies, `first` elements apart."""
    return [first << i for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def words_layout(T, C, WARPS, RANK):
    """Codes as threads hold them: [T * C * 128, 4] (RANK 2), or its [T * C * 32, 4, 2, 2] (RANK 4)."""
    over_warps = WARPS // 4
    rows = 128 if RANK == 2 else 32  # of a tile of 64 x 64
    chunk, tile = _bases(C, rows), _bases(T, rows * C)
    split = over_warps.bit_length() - 1
    if RANK == 2:
        word, threads, warps = [[0, 1], [0, 2]], [[1 << i, 0] for i in range(5)], [[32, 0], [64, 0]]
    else:
        word = [[0, 0, 0, 1], [0, 0, 1, 0]]
        threads = [[0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
        warps = [[8, 0, 0, 0], [16, 0, 0, 0]]
    zeros = [0] * (RANK - 1)
    return gl.DistributedLinearLayout(
        word + [[b, *zeros] for b in chunk + tile[split:]],
        threads,
        warps + [[b, *zeros] for b in tile[:split]],
        [],
        [T * C * 128, 4] if RANK == 2 else [T * C * 32, 4, 2, 2],
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
def store_layout(ROWS, WARPS):
    """[ROWS, tokens], rows fastest."""
    lanes = min(ROWS // 4, 32)
    return gl.BlockedLayout([4, 1], [lanes, 32 // lanes], [1, WARPS], [0, 1])


@gluon.jit
def decode(words, scale_words, T: gl.constexpr, C: gl.constexpr, SCALE: gl.constexpr):
    """Codes int32 [T * C * 128, 4] and their scale words -> bfloat16 [T * 64, C * 64], slots of rows."""
    WARPS: gl.constexpr = gl.num_warps()
    WIDE: gl.constexpr = words_layout(T, C, WARPS, 4)
    w = gl.convert_layout(words.reshape([T * C * 32, 4, 2, 2]), WIDE, assert_trivial=True)
    if SCALE == "e8m0":
        first = scale_words & 0x7F807F80
        second = ((scale_words << 8) | ((scale_words >> 24) & 0xFF)) & 0x7F807F80
    else:
        first, second = scale_words.reshape([T * C * 32, 2]).split()
    WORD: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, WIDE)))
    first = gl.convert_layout(first, WORD, assert_trivial=True)[:, None, None, None]
    second = gl.convert_layout(second, WORD, assert_trivial=True)[:, None, None, None]
    # The comparison is about register numbers, so the compiler decides it.
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, WIDE))))[None, None, :, None]
    s = gl.where(half == 0, first, second)
    w, s = gl.broadcast(w, s)
    o = gl.inline_asm_elementwise(
        _assembly(SCALE), "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [w, s],
        dtype=(gl.bfloat16,) * 8, is_pure=True, pack=2,
    )  # fmt: skip
    low = gl.join(gl.join(o[0], o[1]), gl.join(o[2], o[3]))
    high = gl.join(gl.join(o[4], o[5]), gl.join(o[6], o[7]))
    a = gl.join(low, high).reshape([T, C, 4, 8, 4, 2, 2, 2, 2, 2])
    # tile, chunk, warp, g, t, p, odd column; odd row, h, q -> tile, warp, odd row, g; chunk, p, q, h, t, odd column
    return a.permute([0, 2, 7, 3, 1, 5, 9, 8, 4, 6]).reshape([T * 64, C * 64])


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
def finish(acc, row_scale, bias, rows, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr):
    """As `gemm.scaled`."""
    if ROW_SCALE:
        acc = acc * gl.load(row_scale + rows)[:, None]
    if HAS_BIAS:
        acc = acc + gl.load(bias + rows).to(gl.float32)[:, None]
    return acc


@gluon.jit
def in_order(acc, T: gl.constexpr, BLOCK_M: gl.constexpr):
    """Slots to rows; within a thread."""
    return acc.reshape([T * 4, 2, 8, BLOCK_M]).permute([0, 2, 1, 3]).reshape([T * 64, BLOCK_M])
