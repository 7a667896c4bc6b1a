"""The loop over K on Hopper: codes, scales and tokens arrive by asynchronous copies, several steps ahead.

Weights are wgmma's left operand, in registers; tokens its right one, in shared memory. One program walks all of K in
steps of 16, whatever its sizes, so a token's result depends, to the bit, on no other token.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from microscale.backends.triton.hopper_decode import accumulator, decode, scales_layout, words_layout


@gluon.jit
def buffers(T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, WORDS: gl.constexpr):
    """Shared memory for the codes and scales of STAGES steps."""
    cs = gl.allocate_shared_memory(
        gl.int32, [STAGES, T * C * 128, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    ss = gl.allocate_shared_memory(
        gl.int32, [STAGES, T * C * 32 * WORDS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    return cs, ss


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
def _copy_tokens(
    xs, token_pointers, step, slot, STEPS, K, C: gl.constexpr, EVEN: gl.constexpr, PARTS: gl.constexpr
):
    if EVEN:
        mask = step < STEPS
    else:
        WARPS: gl.constexpr = gl.num_warps()
        TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
        mask = (step * (C * 64) + gl.arange(0, C * 64, gl.SliceLayout(0, TOKENS)) < K)[None, :]
    for p in gl.static_range(PARTS):
        async_copy.async_copy_global_to_shared(
            xs.index(slot * PARTS + p), token_pointers + (p * K + step * (C * 64)), mask=mask
        )


@gluon.jit
def _operand(cs, ss, ACC: gl.constexpr, T: gl.constexpr, C: gl.constexpr, SCALE: gl.constexpr):
    """One slot's weights, as the matrix unit takes them."""
    WARPS: gl.constexpr = gl.num_warps()
    words = cs.load(words_layout(T, C, WARPS, 2))
    scale_words = ss.load(scales_layout(T, C, WARPS, 1 if SCALE == "e8m0" else 2))
    return gl.convert_layout(
        decode(words, scale_words, T, C, SCALE), gl.DotOperandLayout(0, ACC, 2), assert_trivial=True
    )


@gluon.jit
def _multiply(w, xs, slot, acc, PARTS: gl.constexpr):
    """Starts acc + w @ the slot's tokens: PARTS groups of instructions."""
    sums = warpgroup_mma(w, xs.index(slot * PARTS).permute((1, 0)), acc, is_async=True)
    for p in gl.static_range(1, PARTS):
        sums = warpgroup_mma(w, xs.index(slot * PARTS + p).permute((1, 0)), sums, is_async=True)
    return sums


@gluon.jit
def _next(slot, STAGES: gl.constexpr):
    return gl.where(slot == STAGES - 1, 0, slot + 1)


@gluon.jit
def _refill(
    xs, cs, ss, token_pointers, cp, sp, step, slot, STEPS, CHUNKS, K, PENDING: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, WORDS: gl.constexpr, EVEN: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """`step` into a slot that this thread is done with; all but the last PENDING steps asked for are here then."""
    async_copy.wait_group(PENDING)
    # Here for all threads, and all are done with the slot.
    gl.thread_barrier()
    copy_weights(cs, ss, cp, sp, step, slot, STEPS, CHUNKS, T, C, WORDS, EVEN)
    _copy_tokens(xs, token_pointers, step, slot, STEPS, K, C, EVEN, PARTS)
    async_copy.commit_group()


@gluon.jit
def product(
    x, rows, cs, ss, cp, sp, STEPS, CHUNKS, K,
    SCALE: gl.constexpr, EVEN: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, ODD: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """float32 [T * 64, BLOCK_M], slots of rows. The weights of the first STAGES - 1 steps are on their way.

    Args:
        x: bfloat16 [*, PARTS, K], activations as a sum of parts; rows: int64 [BLOCK_M].
    """
    WARPS: gl.constexpr = gl.num_warps()
    WORDS: gl.constexpr = 1 if SCALE == "e8m0" else 2
    ACC: gl.constexpr = accumulator(BLOCK_M, WARPS)
    TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
    XS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, C * 64], gl.bfloat16)
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * PARTS, BLOCK_M, C * 64], XS)
    tp = x + rows[:, None] * (PARTS * K) + gl.arange(0, C * 64, gl.SliceLayout(0, TOKENS))[None, :]
    for s in gl.static_range(STAGES - 1):
        _copy_tokens(xs, tp, s, s, STEPS, K, C, EVEN, PARTS)
        async_copy.commit_group()
    acc = gl.zeros([T * 64, BLOCK_M], gl.float32, ACC)
    slot, free = 0, STAGES - 1
    if OVERLAP:
        # Two products are under way: while one runs, the one before it is waited for, and the next step is decoded
        # into that one's registers. Two steps a turn, so that no register is copied while a product reads it.
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()
        even = _operand(cs.index(0), ss.index(0), ACC, T, C, SCALE)
        odd = even
        for turn in range(STEPS // 2):
            sums = _multiply(even, xs, slot, acc, PARTS)
            acc, odd = warpgroup_mma_wait(PARTS, deps=[sums, odd])
            ahead = 2 * turn + STAGES - 1
            _refill(
                xs, cs, ss, tp, cp, sp, ahead, free, STEPS, CHUNKS, K, STAGES - 3, T, C, WORDS, EVEN, PARTS
            )
            free = slot
            slot = _next(slot, STAGES)
            odd = _operand(cs.index(slot), ss.index(slot), ACC, T, C, SCALE)
            sums = _multiply(odd, xs, slot, acc, PARTS)
            acc, even = warpgroup_mma_wait(PARTS, deps=[sums, even])
            ahead += 1
            _refill(
                xs, cs, ss, tp, cp, sp, ahead, free, STEPS, CHUNKS, K, STAGES - 3, T, C, WORDS, EVEN, PARTS
            )
            free = slot
            slot = _next(slot, STAGES)
            even = _operand(cs.index(slot), ss.index(slot), ACC, T, C, SCALE)
        if ODD:
            sums = _multiply(even, xs, slot, acc, PARTS)
            acc, even, odd = warpgroup_mma_wait(0, deps=[sums, even, odd])
        else:
            acc, even, odd = warpgroup_mma_wait(0, deps=[acc, even, odd])
    else:
        for step in range(STEPS):
            ahead = step + STAGES - 1
            _refill(
                xs, cs, ss, tp, cp, sp, ahead, free, STEPS, CHUNKS, K, STAGES - 2, T, C, WORDS, EVEN, PARTS
            )
            w = _operand(cs.index(slot), ss.index(slot), ACC, T, C, SCALE)
            sums = _multiply(w, xs, slot, acc, PARTS)
            acc = warpgroup_mma_wait(0, deps=[sums])
            free = slot
            slot = _next(slot, STAGES)
    async_copy.wait_group(0)
    return acc
