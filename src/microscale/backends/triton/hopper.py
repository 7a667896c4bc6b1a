"""Linear and experts on Hopper (sm_90) for E2M1 weights and bfloat16 activations, in Gluon: layouts are given, so that
decoded weights go from registers into the matrix unit and nothing decoded passes through shared memory.

Weights are wgmma's left operand, in registers; tokens its right one, in shared memory. Codes, scales and tokens arrive
by asynchronous copies, several stages ahead. One program walks all of K in steps of 16, whatever its sizes, so a
token's result depends, to the bit, on no other token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from microscale.backends.triton import tiles
from microscale.backends.triton.fragments import Fragments

# `fragments` says where the bits lie. $8 and $9 are the two words of codes, $10 a word of scales.
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
def _words_layout(T, C, WARPS, RANK):
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
def _scales_layout(T, C, WARPS, WORDS):
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
def _decode(words, scale_words, T: gl.constexpr, C: gl.constexpr, SCALE: gl.constexpr):
    """Codes int32 [T * C * 128, 4] and their scale words -> bfloat16 [T * 64, C * 64], slots of rows."""
    WARPS: gl.constexpr = gl.num_warps()
    WIDE: gl.constexpr = _words_layout(T, C, WARPS, 4)
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
def buffers(
    BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, WORDS: gl.constexpr
):
    """Shared memory for STAGES steps: tokens, codes, scales."""
    XS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, C * 64], gl.bfloat16)
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, C * 64], XS)
    cs = gl.allocate_shared_memory(
        gl.int32, [STAGES, T * C * 128, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    ss = gl.allocate_shared_memory(
        gl.int32, [STAGES, T * C * 32 * WORDS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    return xs, cs, ss


@gluon.jit
def pointers(
    codes, scales, matrix, first, second, TILES, CHUNKS, T: gl.constexpr, C: gl.constexpr, WORDS: gl.constexpr
):
    """Where a program's codes [T * C * 128, 4] and scale words [T * C * 32 * WORDS] of step 0 lie.

    Args:
        matrix: int64, the expert; first, second: number of the first tile, and of the one that half way follows.
    """
    WARPS: gl.constexpr = gl.num_warps()
    CODES: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    i = gl.arange(0, T * C * 128, gl.SliceLayout(1, CODES))
    tile = i // (C * 128)
    if T > 1:
        tile = gl.where(tile < T // 2, first + tile, second + tile - T // 2)
    else:
        tile = first + tile
    # Past the end a program repeats the last tile, and stores nothing of it.
    tile = gl.minimum(tile, TILES - 1)
    offset = tile * (CHUNKS * 512) + i % (C * 128) * 4
    code_pointers = (
        codes
        + matrix * TILES * CHUNKS * 512
        + offset[:, None]
        + gl.arange(0, 4, gl.SliceLayout(0, CODES))[None, :]
    )
    SCALES: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    j = gl.arange(0, T * C * 32 * WORDS, SCALES)
    tile = j // (C * 32 * WORDS)
    if T > 1:
        tile = gl.where(tile < T // 2, first + tile, second + tile - T // 2)
    else:
        tile = first + tile
    tile = gl.minimum(tile, TILES - 1)
    scale_pointers = (
        scales + matrix * TILES * CHUNKS * (32 * WORDS) + tile * (CHUNKS * 32 * WORDS) + j % (C * 32 * WORDS)
    )
    return code_pointers, scale_pointers


@gluon.jit
def copy_weights(
    cs,
    ss,
    code_pointers,
    scale_pointers,
    step,
    slot,
    STEPS,
    CHUNKS,
    T: gl.constexpr,
    C: gl.constexpr,
    WORDS: gl.constexpr,
    EVEN: gl.constexpr,
):
    """Codes and scales of one step into a slot; nothing past the last step, zeros past the last chunk."""
    WARPS: gl.constexpr = gl.num_warps()
    inside = step < STEPS
    if EVEN:
        async_copy.async_copy_global_to_shared(cs.index(slot), code_pointers + step * (C * 512), mask=inside)
        async_copy.async_copy_global_to_shared(
            ss.index(slot), scale_pointers + step * (C * 32 * WORDS), mask=inside
        )
    else:
        CODES: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
        i = gl.arange(0, T * C * 128, gl.SliceLayout(1, CODES))
        there = step * C + i // 128 % C < CHUNKS
        async_copy.async_copy_global_to_shared(
            cs.index(slot), code_pointers + step * (C * 512), mask=there[:, None]
        )
        SCALES: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
        j = gl.arange(0, T * C * 32 * WORDS, SCALES)
        there = step * C + j // (32 * WORDS) % C < CHUNKS
        async_copy.async_copy_global_to_shared(
            ss.index(slot), scale_pointers + step * (C * 32 * WORDS), mask=there
        )


@gluon.jit
def _copy_tokens(xs, token_pointers, step, slot, STEPS, K, C: gl.constexpr, EVEN: gl.constexpr):
    if EVEN:
        inside = step < STEPS
        async_copy.async_copy_global_to_shared(xs.index(slot), token_pointers + step * (C * 64), mask=inside)
    else:
        WARPS: gl.constexpr = gl.num_warps()
        TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
        column = step * (C * 64) + gl.arange(0, C * 64, gl.SliceLayout(0, TOKENS))
        async_copy.async_copy_global_to_shared(
            xs.index(slot), token_pointers + step * (C * 64), mask=(column < K)[None, :]
        )


@gluon.jit
def _operand(cs, ss, ACC: gl.constexpr, T: gl.constexpr, C: gl.constexpr, SCALE: gl.constexpr):
    """One slot's weights, as the matrix unit takes them."""
    WARPS: gl.constexpr = gl.num_warps()
    words = cs.load(_words_layout(T, C, WARPS, 2))
    scale_words = ss.load(_scales_layout(T, C, WARPS, 1 if SCALE == "e8m0" else 2))
    return gl.convert_layout(
        _decode(words, scale_words, T, C, SCALE), gl.DotOperandLayout(0, ACC, 2), assert_trivial=True
    )


@gluon.jit
def _next(slot, STAGES: gl.constexpr):
    return gl.where(slot == STAGES - 1, 0, slot + 1)


@gluon.jit
def product(
    x, rows, xs, cs, ss, code_pointers, scale_pointers, STEPS, CHUNKS, K,
    SCALE: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """float32 [T * 64, BLOCK_M], slots of rows. The weights of the first STAGES - 1 steps are on their way.

    Args:
        rows: int64 [BLOCK_M], rows of x.
    """
    WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = 1 if SCALE == "e8m0" else 2
    ACC: gl.constexpr = accumulator(BLOCK_M, WARPS)
    TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
    token_pointers = x + rows[:, None] * K + gl.arange(0, C * 64, gl.SliceLayout(0, TOKENS))[None, :]
    for s in gl.static_range(STAGES - 1):
        _copy_tokens(xs, token_pointers, s, s, STEPS, K, C, EVEN)
        async_copy.commit_group()
    acc = gl.zeros([T * 64, BLOCK_M], gl.float32, ACC)
    slot, free = 0, STAGES - 1
    if OVERLAP:
        # The next step is decoded while the matrix unit works on this one.
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()
        w = _operand(cs.index(0), ss.index(0), ACC, T, C, SCALE)
        for step in range(STEPS):
            sums = warpgroup_mma(w, xs.index(slot).permute((1, 0)), acc, is_async=True)
            async_copy.wait_group(STAGES - 3)
            # The next step is here, and all are done with the one before this.
            gl.thread_barrier()
            ahead = step + STAGES - 1
            copy_weights(cs, ss, code_pointers, scale_pointers, ahead, free, STEPS, CHUNKS, T, C, WORDS, EVEN)
            _copy_tokens(xs, token_pointers, ahead, free, STEPS, K, C, EVEN)
            async_copy.commit_group()
            free = slot
            slot = _next(slot, STAGES)
            following = _operand(cs.index(slot), ss.index(slot), ACC, T, C, SCALE)
            acc, w = warpgroup_mma_wait(0, deps=[sums, w])
            w = following
    else:
        for step in range(STEPS):
            async_copy.wait_group(STAGES - 2)
            # This step is here, and all are done with the one before it.
            gl.thread_barrier()
            ahead = step + STAGES - 1
            copy_weights(cs, ss, code_pointers, scale_pointers, ahead, free, STEPS, CHUNKS, T, C, WORDS, EVEN)
            _copy_tokens(xs, token_pointers, ahead, free, STEPS, K, C, EVEN)
            async_copy.commit_group()
            w = _operand(cs.index(slot), ss.index(slot), ACC, T, C, SCALE)
            sums = warpgroup_mma(w, xs.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[sums])
            free = slot
            slot = _next(slot, STAGES)
    async_copy.wait_group(0)
    return acc


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


@gluon.jit(do_not_specialize=["M", "TILES", "CHUNKS", "STEPS"])
def _linear_kernel(
    y, x, codes, scales, row_scale, bias, M, N, K, TILES, CHUNKS, STEPS,
    SCALE: gl.constexpr, EVEN: gl.constexpr, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = 1 if SCALE == "e8m0" else 2
    # GROUP blocks of tokens take turns with the rows, so that both are found in the cache.
    blocks_n, blocks_m = gl.cdiv(TILES, T), gl.cdiv(M, BLOCK_M)
    group = gl.program_id(0) // (blocks_n * GROUP)
    height = gl.minimum(blocks_m - group * GROUP, GROUP)
    within = gl.program_id(0) % (blocks_n * GROUP)
    block_n, block_m = within // height, group * GROUP + within % height
    first = block_n * T
    xs, cs, ss = buffers(BLOCK_M, T, C, STAGES, WORDS)
    cp, sp = pointers(
        codes, scales, gl.to_tensor(0).to(gl.int64), first, first + T // 2, TILES, CHUNKS, T, C, WORDS
    )
    for s in gl.static_range(STAGES - 1):
        copy_weights(cs, ss, cp, sp, s, s, STEPS, CHUNKS, T, C, WORDS, EVEN)
    TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
    m = block_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TOKENS))
    acc = product(
        x,
        gl.minimum(m, M - 1).to(gl.int64),
        xs,
        cs,
        ss,
        cp,
        sp,
        STEPS,
        CHUNKS,
        K,
        SCALE,
        EVEN,
        BLOCK_M,
        T,
        C,
        STAGES,
        OVERLAP,
    )
    rows = gl.minimum(slots(first, first + T // 2, T, gl.SliceLayout(1, accumulator(BLOCK_M, WARPS))), N - 1)
    acc = finish(acc, row_scale, bias, rows, ROW_SCALE, HAS_BIAS)
    STORE: gl.constexpr = store_layout(T * 64, WARPS)
    out = gl.convert_layout(in_order(acc.to(y.dtype.element_ty), T, BLOCK_M), STORE)
    n = first * 64 + gl.arange(0, T * 64, gl.SliceLayout(1, STORE))
    m = block_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, STORE))
    gl.store(y + m.to(gl.int64)[None, :] * N + n[:, None], out, mask=(n < N)[:, None] & (m < M)[None, :])


@dataclass(frozen=True)
class Cut:
    """How a product is cut into programs and steps. Decides the speed only: no sum depends on it.

    Attributes:
        block_m: tokens of a program, 8 to 256.
        tiles: of 64 rows in a program.
        chunks: of 64 columns in a step.
        warps: 4, or 8 and at least two tiles.
        stages: steps whose weights and tokens are in shared memory.
        overlap: decode the next step while the matrix unit works.
    """

    block_m: int
    tiles: int
    chunks: int
    warps: int
    stages: int
    overlap: bool = False

    def constants(self, w: Fragments) -> dict[str, Any]:
        """Compile-time arguments of the kernels."""
        return {
            "SCALE": w.format.scale,
            "EVEN": w.shape[-1] % (64 * self.chunks) == 0,
            "BLOCK_M": self.block_m,
            "T": self.tiles,
            "C": self.chunks,
            "STAGES": self.stages,
            "OVERLAP": self.overlap,
            "ROW_SCALE": w.row_scale is not None,
            "num_warps": self.warps,
        }

    def sizes(self, w: Fragments) -> tuple[int, int, int]:
        """Of the matrix: tiles, chunks, and the steps that these are cut into."""
        return w.tiles, w.chunks, -(-w.chunks // self.chunks)


def linear_cut(tokens: int, w: Fragments) -> Cut:
    """The choice for `tokens` rows."""
    if tokens <= 32:
        return Cut(8 if tokens <= 8 else 16 if tokens <= 16 else 32, 1, 2, 4, 8, True)
    if tokens <= 64:
        return Cut(64, 1, 2, 4, 6, True)
    if tokens <= 256:
        return Cut(128, 2, 1, 8, 6, True)
    return Cut(128, 4, 1, 8, 6, True)


def linear(x: Tensor, w: Fragments, bias: Tensor | None, cut: Cut | None = None) -> Tensor:
    """bfloat16 [M, K] -> [M, N]; M and N at least 1."""
    m, (n, k) = x.shape[0], w.shape
    cut = cut or linear_cut(m, w)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    with tiles.on(x.device):
        _linear_kernel[(-(-w.tiles // cut.tiles) * -(-m // cut.block_m),)](
            y, aligned(x), w.codes, w.scales, w.row_scale, bias, m, n, k, *cut.sizes(w),
            HAS_BIAS=bias is not None, GROUP=8, **cut.constants(w),
        )  # fmt: skip
    return y


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and so placed that 16 bytes can be copied at a time."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
