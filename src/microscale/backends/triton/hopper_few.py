"""The loop over K on Hopper for a few tokens: all that is needed of them lies in shared memory before it begins, and
codes go straight to registers, several steps of 64 columns ahead. So nobody waits for anybody in the loop, but for the
matrix unit. The same sums in the same order as `hopper_loop`'s, to the bit.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from microscale.backends.triton.gluon_names import barrier, load_shared, reinterpret
from microscale.backends.triton.hopper_decode import (
    accumulator,
    bits_of,
    operand,
    scales_layout,
    words_layout,
)
from microscale.backends.triton.hopper_loop import scale_words, tile_of, wide_rows


@gluon.constexpr_function
def _copied(CHUNKS):
    """Columns of a copy of tokens: as many times 256 as a power of two can be to divide all, since the compiler puts a
    barrier between two copies."""
    quads = (CHUNKS + 3) // 4
    return (quads & -quads) * 256


@gluon.constexpr_function
def _copies(CHUNKS):
    quads = (CHUNKS + 3) // 4
    return quads // (quads & -quads)


@gluon.constexpr_function
def _steps(CHUNKS, C, STAGES):
    """So many that turns of STAGES come out even, if there are tokens for them: what stands behind the turns is code
    that runs once, and has to be fetched."""
    steps = (CHUNKS + C - 1) // C
    even = (steps + STAGES - 1) // STAGES * STAGES
    return even if even * C <= (CHUNKS + 3) // 4 * 4 else steps


@gluon.constexpr_function
def few_places(WARPS):
    """Tokens by columns, of which a thread copies 8 at a time."""
    return gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])


@gluon.jit
def _words_at(
    words, matrix, first, second, TILES, CHUNKS: gl.constexpr, STRIDE: gl.constexpr, FIRST: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """[T * C * ROWS, WIDTH] of step 0, from word FIRST of STRIDE, of each tile and chunk; and which chunk it is."""
    LAYOUT: gl.constexpr = words_layout(T, C, gl.num_warps(), ROWS, WIDTH)
    i = gl.arange(0, T * C * ROWS, gl.SliceLayout(1, LAYOUT))
    tile = tile_of(i // (C * ROWS), first, second, TILES, T)
    chunk = i // ROWS % C
    offset = tile * (CHUNKS * STRIDE) + chunk * STRIDE + FIRST + i % ROWS * WIDTH
    within = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    at = words + matrix * TILES * (CHUNKS * STRIDE) + offset[:, None] + within[None, :]
    return at, gl.broadcast(chunk[:, None], at)[0]


@gluon.jit
def pointers(
    codes, scales, matrix, first, second, TILES,
    CHUNKS: gl.constexpr, T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """Where each thread's codes, their further bits and its scales of step 0 lie; see `hopper_loop.pointers`."""
    BITS: gl.constexpr = bits_of(ELEMENT)
    cp = _words_at(codes, matrix, first, second, TILES, CHUNKS, 128 * BITS, 0, T, C, wide_rows(ELEMENT), 4)
    dp = cp
    if BITS == 6:
        dp = _words_at(codes, matrix, first, second, TILES, CHUNKS, 768, 512, T, C, 128, 2)
    SIZE: gl.constexpr = 32 * scale_words(SCALE)
    j = gl.arange(0, T * C * SIZE, scales_layout(T, C, gl.num_warps(), scale_words(SCALE)))
    tile = tile_of(j // (C * SIZE), first, second, TILES, T)
    sp = scales + matrix * TILES * (CHUNKS * SIZE) + tile * (CHUNKS * SIZE) + j % (C * SIZE)
    return cp, dp, (sp, j // SIZE % C)


@gluon.jit
def _load(at, step, CHUNKS: gl.constexpr, STRIDE: gl.constexpr, C: gl.constexpr):
    """Zeros past the last chunk, which multiply tokens that are 0 there."""
    pointer, chunk = at
    return gl.load(pointer + step * (C * STRIDE), mask=chunk + step * C < CHUNKS, other=0)


@gluon.jit
def _weights(at, step, CHUNKS: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr):
    """A step's codes, their further bits and scales, as `hopper_decode.operand` takes them."""
    cp, dp, sp = at
    words = _load(cp, step, CHUNKS, 128 * bits_of(ELEMENT), C)
    more = words
    if bits_of(ELEMENT) == 6:
        more = _load(dp, step, CHUNKS, 768, C)
    scale = _load(sp, step, CHUNKS, 32 * scale_words(SCALE), C)
    # This costs nothing, but without it ptxas puts the loads of a whole turn behind its last product, where they are
    # late: no load passes it.
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff;\nmov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    return words, more, scale


@gluon.jit
def ahead(
    at,
    CHUNKS: gl.constexpr,
    C: gl.constexpr,
    STAGES: gl.constexpr,
    ELEMENT: gl.constexpr,
    SCALE: gl.constexpr,
):
    """Tuple of the weights of the first STAGES steps, which changes nothing and waits for nothing."""
    found = ()
    for s in gl.static_range(STAGES):
        found = found + (_weights(at, gl.to_tensor(s), CHUNKS, C, ELEMENT, SCALE),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit
def _replaced(ring, PLACE: gl.constexpr, weights):
    """The ring with other weights at a place."""
    found = ()
    for i in gl.static_range(len(ring)):
        if i == PLACE:
            found = found + (weights,)  # type: ignore[assignment]  # noqa: RUF005
        else:
            found = found + (ring[i],)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit
def _copy_tokens(
    x, rows, real, K, CHUNKS: gl.constexpr, ROOM: gl.constexpr, BLOCK_M: gl.constexpr, C: gl.constexpr
):
    """Shared memory [steps, BLOCK_M, C * 64] to which all of K of the tokens is on its way; 0 past K and past them.

    64 columns of all tokens lie together, so that it does not matter how many a copy or a step has.
    """
    WIDTH: gl.constexpr = _copied(CHUNKS)
    COPIES: gl.constexpr = _copies(CHUNKS)
    TOKENS: gl.constexpr = few_places(gl.num_warps())
    COPY: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, WIDTH], gl.bfloat16)
    STEP: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, C * 64], gl.bfloat16)
    HELD: gl.constexpr = ROOM * 256 // WIDTH
    xs = gl.allocate_shared_memory(gl.bfloat16, [HELD, BLOCK_M, WIDTH], COPY)
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, TOKENS))
    tp = x + rows[:, None] * K + column[None, :]
    for i in gl.static_range(COPIES):
        mask = real[:, None] & (i * WIDTH + column < K)[None, :]
        load_shared(xs.index(i), tp + i * WIDTH, mask=mask)
    async_copy.commit_group()
    return reinterpret(xs, gl.bfloat16, [HELD * WIDTH // (C * 64), BLOCK_M, C * 64], STEP)


@gluon.jit
def product(
    x, rows, real, at, ring, K,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, CHUNKS: gl.constexpr, ROOM: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """float32 [T * 64, BLOCK_M], slots of rows.

    Args:
        x: bfloat16 [*, K]; rows: int64 [BLOCK_M]; real: which of these are tokens at all.
        at, ring: of `pointers` and `ahead`.
        ROOM: `cuts.Cut.room`.
    """
    ACC: gl.constexpr = accumulator(BLOCK_M, gl.num_warps())
    STEPS: gl.constexpr = _steps(CHUNKS, C, STAGES)
    xs = _copy_tokens(x, rows, real, K, CHUNKS, ROOM, BLOCK_M, C)
    acc = gl.zeros([T * 64, BLOCK_M], gl.float32, ACC)
    now = operand(ring[0], 0, 1, ACC, T, C, ELEMENT, SCALE)
    ring = _replaced(ring, 0, _weights(at, gl.to_tensor(STAGES), CHUNKS, C, ELEMENT, SCALE))
    async_copy.wait_group(0)
    barrier()
    # A step is decoded while the one before it is multiplied.
    for turn in range(STEPS // STAGES):
        for s in gl.static_range(STAGES):
            step = turn * STAGES + s
            sums = warpgroup_mma(now, xs.index(step).permute((1, 0)), acc, is_async=True)
            after = operand(ring[(s + 1) % STAGES], 0, 1, ACC, T, C, ELEMENT, SCALE)
            later = _weights(at, step + (1 + STAGES), CHUNKS, C, ELEMENT, SCALE)
            ring = _replaced(ring, (s + 1) % STAGES, later)
            acc, now = warpgroup_mma_wait(0, deps=[sums, now])
            now = after
    for s in gl.static_range(STEPS % STAGES):
        step = STEPS - STEPS % STAGES + s
        sums = warpgroup_mma(now, xs.index(step).permute((1, 0)), acc, is_async=True)
        after = operand(ring[(s + 1) % STAGES], 0, 1, ACC, T, C, ELEMENT, SCALE)
        acc, now = warpgroup_mma_wait(0, deps=[sums, now])
        now = after
    return acc
