"""The loop over K on Hopper: codes, scales and tokens arrive by asynchronous copies, several steps ahead.

Weights are wgmma's left operand, in registers; tokens its right one, in shared memory. One program walks all of K in
steps of 16, whatever its sizes, so a token's result depends, to the bit, on no other token. Block FP8's scales multiply
sums over 128 columns, one step.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from microscale.backends.triton.hopper_decode import (
    accumulator,
    bits_of,
    operand,
    scales_layout,
    words_layout,
)

# Triton 3.7 gave it another name.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.constexpr_function
def wide_rows(ELEMENT):
    """Of 16 bytes, in a tile of codes; 6 bits have 128 of 8 bytes more."""
    return 256 if bits_of(ELEMENT) == 8 else 128


@gluon.constexpr_function
def scale_words(SCALE):
    """Of a tile, for 32 words."""
    return 2 if SCALE == "e4m3" else 1


@gluon.jit
def buffers(
    T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr
):
    """Shared memory for the codes, their further bits and the scales of STAGES steps."""
    ROWS: gl.constexpr = T * C * wide_rows(ELEMENT)
    cs = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    ds, ss = cs, cs
    if bits_of(ELEMENT) == 6:
        ds = gl.allocate_shared_memory(
            gl.int32, [STAGES, T * C * 128, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
    if SCALE != "f32":
        ss = gl.allocate_shared_memory(
            gl.int32, [STAGES, T * C * 32 * scale_words(SCALE)], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
    return cs, ds, ss


@gluon.jit
def tile_of(i, first, second, TILES, T: gl.constexpr):
    """The tile that a program's i-th is; past the end a program repeats the last one, and stores nothing of it."""
    if T > 1:
        tile = gl.where(i < T // 2, first + i, second + i - T // 2)
    else:
        tile = first + i
    return gl.minimum(tile, TILES - 1)


@gluon.jit
def _pointers(
    words, matrix, first, second, TILES, CHUNKS, STRIDE: gl.constexpr, FIRST: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """[T * C * ROWS, WIDTH] of step 0: from word FIRST of STRIDE, of each tile and chunk."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32, 1], [gl.num_warps(), 1], [1, 0])
    i = gl.arange(0, T * C * ROWS, gl.SliceLayout(1, LAYOUT))
    tile = tile_of(i // (C * ROWS), first, second, TILES, T)
    offset = tile * (CHUNKS * STRIDE) + i // ROWS % C * STRIDE + FIRST + i % ROWS * WIDTH
    within = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    return words + matrix * TILES * CHUNKS * STRIDE + offset[:, None] + within[None, :]


@gluon.jit
def pointers(
    codes, scales, matrix, first, second, TILES, CHUNKS,
    T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """Where a program's codes, their further bits and its scales of step 0 lie; block FP8: the matrix's scales.

    Args:
        matrix: int64, the expert; first, second: number of the first tile, and of the one that half way follows.
    """
    BITS: gl.constexpr = bits_of(ELEMENT)
    cp = _pointers(codes, matrix, first, second, TILES, CHUNKS, 128 * BITS, 0, T, C, wide_rows(ELEMENT), 4)
    dp, sp = cp, scales
    if BITS == 6:
        dp = _pointers(codes, matrix, first, second, TILES, CHUNKS, 768, 512, T, C, 128, 2)
    if SCALE == "f32":
        sp = scales + matrix * (gl.cdiv(TILES, 2) * gl.cdiv(CHUNKS, 2))
    else:
        WORDS: gl.constexpr = scale_words(SCALE)
        LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
        j = gl.arange(0, T * C * 32 * WORDS, LAYOUT)
        tile = tile_of(j // (C * 32 * WORDS), first, second, TILES, T)
        sp = scales + matrix * TILES * CHUNKS * (32 * WORDS)
        sp = sp + tile * (CHUNKS * 32 * WORDS) + j % (C * 32 * WORDS)
    return cp, dp, sp


@gluon.jit
def _copy(
    buffer, pointer, step, slot, STEPS, CHUNKS, STRIDE: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    if EVEN:
        mask = step < STEPS
    else:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32, 1], [gl.num_warps(), 1], [1, 0])
        i = gl.arange(0, T * C * ROWS, gl.SliceLayout(1, LAYOUT))
        mask = (step * C + i // ROWS % C < CHUNKS)[:, None]
    async_copy.async_copy_global_to_shared(buffer.index(slot), pointer + step * (C * STRIDE), mask=mask)


@gluon.jit
def copy_weights(
    held, at, step, slot, STEPS, CHUNKS,
    T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Codes and scales of one step into a slot; nothing past the last step, zeros past the last chunk.

    Args:
        held, at: what `buffers` and `pointers` return.
    """
    cs, ds, ss = held
    cp, dp, sp = at
    BITS: gl.constexpr = bits_of(ELEMENT)
    _copy(cs, cp, step, slot, STEPS, CHUNKS, 128 * BITS, T, C, wide_rows(ELEMENT), 4, EVEN)
    if BITS == 6:
        _copy(ds, dp, step, slot, STEPS, CHUNKS, 768, T, C, 128, 2, EVEN)
    if SCALE != "f32":
        WORDS: gl.constexpr = scale_words(SCALE)
        if EVEN:
            mask = step < STEPS
        else:
            LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
            j = gl.arange(0, T * C * 32 * WORDS, LAYOUT)
            mask = step * C + j // (32 * WORDS) % C < CHUNKS
        async_copy.async_copy_global_to_shared(ss.index(slot), sp + step * (C * 32 * WORDS), mask=mask)


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
def _load(held, slot, T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr):
    """One slot's weights as they are: codes, their further bits, scales."""
    WARPS: gl.constexpr = gl.num_warps()
    cs, ds, ss = held
    words = cs.index(slot).load(words_layout(T, C, WARPS, wide_rows(ELEMENT), 4))
    more, scale = words, words
    if bits_of(ELEMENT) == 6:
        more = ds.index(slot).load(words_layout(T, C, WARPS, 128, 2))
    if SCALE != "f32":
        scale = ss.index(slot).load(scales_layout(T, C, WARPS, scale_words(SCALE)))
    return words, more, scale


@gluon.jit
def _multiply(
    w, xs, slot, acc, HALF: gl.constexpr, C: gl.constexpr, PARTS: gl.constexpr, FRESH: gl.constexpr
):
    """Starts acc + w @ the slot's tokens, or FRESH w @ them: PARTS groups of instructions."""
    sums = acc
    for p in gl.static_range(PARTS):
        x = xs.index(slot * PARTS + p)
        if HALF < 2:
            x = x.slice(HALF * (C * 32), C * 32, dim=1)
        sums = warpgroup_mma(w, x.permute((1, 0)), sums, use_acc=p > 0 or not FRESH, is_async=True)
    return sums


@gluon.jit
def next_slot(slot, STAGES: gl.constexpr):
    return gl.where(slot == STAGES - 1, 0, slot + 1)


@gluon.jit
def _refill(
    xs, held, token_pointers, at, step, slot, STEPS, CHUNKS, K, PENDING: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr, EVEN: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """`step` into a slot that this thread is done with; all but the last PENDING steps asked for are here then."""
    async_copy.wait_group(PENDING)
    # Here for all threads, and all are done with the slot.
    barrier()
    copy_weights(held, at, step, slot, STEPS, CHUNKS, T, C, ELEMENT, SCALE, EVEN)
    _copy_tokens(xs, token_pointers, step, slot, STEPS, K, C, EVEN, PARTS)
    async_copy.commit_group()


@gluon.jit
def block_scales(sp, step, STEPS, first, second, TILES, T: gl.constexpr, ACC: gl.constexpr):
    """Of a step's 128 columns, float32 [T * 64]: two tiles of rows share one."""
    i = gl.arange(0, T * 64, gl.SliceLayout(1, ACC))
    tile = tile_of(i // 64, first, second, TILES, T)
    return gl.load(sp + tile // 2 * STEPS + gl.minimum(step, STEPS - 1))


@gluon.jit
def add_block(part, scale, acc):
    """acc + part [rows, tokens] * scale [rows]."""
    # Spelt as fma: whether a compiler joins a product and a sum must not depend on the sizes.
    return gl.fma(part, gl.broadcast(scale[:, None], part)[0], acc)


@gluon.jit
def product(
    x, rows, held, at, first, second, TILES, STEPS, CHUNKS, K,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, EVEN: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, ODD: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """float32 [T * 64, BLOCK_M], slots of rows. The weights of the first STAGES - 1 steps are on their way.

    Args:
        x: bfloat16 [*, PARTS, K], activations as a sum of parts; rows: int64 [BLOCK_M].
        held, at: as in `copy_weights`; first, second, TILES: as in `pointers`.
    """
    WARPS: gl.constexpr = gl.num_warps()
    ACC: gl.constexpr = accumulator(BLOCK_M, WARPS)
    TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
    XS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, C * 64], gl.bfloat16)
    # Block FP8: sums of a step, and then those of all.
    APART: gl.constexpr = SCALE == "f32"
    sp = at[2]
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * PARTS, BLOCK_M, C * 64], XS)
    tp = x + rows[:, None] * (PARTS * K) + gl.arange(0, C * 64, gl.SliceLayout(0, TOKENS))[None, :]
    for s in gl.static_range(STAGES - 1):
        _copy_tokens(xs, tp, s, s, STEPS, K, C, EVEN, PARTS)
        async_copy.commit_group()
    acc = gl.zeros([T * 64, BLOCK_M], gl.float32, ACC)
    slot, free = 0, STAGES - 1
    if OVERLAP and not APART:
        # While halves of a step are multiplied, those of the next one are decoded, each into the registers of a half
        # that is done. A warp that starts a product waits until the one before it has begun, so what a half is decoded
        # beside must come between two of them. Two steps a turn, so that no register is copied while it is read.
        async_copy.wait_group(STAGES - 2)
        barrier()
        loaded = _load(held, 0, T, C, ELEMENT, SCALE)
        even0 = operand(loaded, 0, 2, ACC, T, C, ELEMENT, SCALE)
        even1 = operand(loaded, 1, 2, ACC, T, C, ELEMENT, SCALE)
        odd0, odd1 = even0, even1
        for turn in range(STEPS // 2):
            ahead = 2 * turn + STAGES - 1
            sums = _multiply(even0, xs, slot, acc, 0, C, PARTS, False)
            acc, odd0, odd1 = warpgroup_mma_wait(PARTS, deps=[sums, odd0, odd1])
            _refill(
                xs, held, tp, at, ahead, free, STEPS, CHUNKS, K, STAGES - 3,
                T, C, ELEMENT, SCALE, EVEN, PARTS,
            )  # fmt: skip
            free = slot
            slot = next_slot(slot, STAGES)
            loaded = _load(held, slot, T, C, ELEMENT, SCALE)
            odd0 = operand(loaded, 0, 2, ACC, T, C, ELEMENT, SCALE)
            acc = _multiply(even1, xs, free, acc, 1, C, PARTS, False)
            odd1 = operand(loaded, 1, 2, ACC, T, C, ELEMENT, SCALE)
            sums = _multiply(odd0, xs, slot, acc, 0, C, PARTS, False)
            acc, even0, even1 = warpgroup_mma_wait(PARTS, deps=[sums, even0, even1])
            _refill(
                xs, held, tp, at, ahead + 1, free, STEPS, CHUNKS, K, STAGES - 3,
                T, C, ELEMENT, SCALE, EVEN, PARTS,
            )  # fmt: skip
            free = slot
            slot = next_slot(slot, STAGES)
            loaded = _load(held, slot, T, C, ELEMENT, SCALE)
            even0 = operand(loaded, 0, 2, ACC, T, C, ELEMENT, SCALE)
            sums = _multiply(odd1, xs, free, acc, 1, C, PARTS, False)
            acc = warpgroup_mma_wait(2 * PARTS, deps=[sums])
            even1 = operand(loaded, 1, 2, ACC, T, C, ELEMENT, SCALE)
        if ODD:
            acc = _multiply(even0, xs, slot, acc, 0, C, PARTS, False)
            acc = _multiply(even1, xs, slot, acc, 1, C, PARTS, False)
        acc, even0, even1, odd0, odd1 = warpgroup_mma_wait(0, deps=[acc, even0, even1, odd0, odd1])
    elif OVERLAP:
        # A step is decoded while the one before it is multiplied.
        async_copy.wait_group(STAGES - 2)
        barrier()
        even = operand(_load(held, 0, T, C, ELEMENT, SCALE), 0, 1, ACC, T, C, ELEMENT, SCALE)
        for turn in range(STEPS // 2):
            ahead = 2 * turn + STAGES - 1
            scale = block_scales(sp, 2 * turn, STEPS, first, second, TILES, T, ACC)
            sums = _multiply(even, xs, slot, acc, 2, C, PARTS, True)
            _refill(
                xs, held, tp, at, ahead, free, STEPS, CHUNKS, K, STAGES - 3,
                T, C, ELEMENT, SCALE, EVEN, PARTS,
            )  # fmt: skip
            free = slot
            slot = next_slot(slot, STAGES)
            odd = operand(_load(held, slot, T, C, ELEMENT, SCALE), 0, 1, ACC, T, C, ELEMENT, SCALE)
            sums, even = warpgroup_mma_wait(0, deps=[sums, even])
            acc = add_block(sums, scale, acc)
            scale = block_scales(sp, 2 * turn + 1, STEPS, first, second, TILES, T, ACC)
            sums = _multiply(odd, xs, slot, acc, 2, C, PARTS, True)
            _refill(
                xs, held, tp, at, ahead + 1, free, STEPS, CHUNKS, K, STAGES - 3,
                T, C, ELEMENT, SCALE, EVEN, PARTS,
            )  # fmt: skip
            free = slot
            slot = next_slot(slot, STAGES)
            even = operand(_load(held, slot, T, C, ELEMENT, SCALE), 0, 1, ACC, T, C, ELEMENT, SCALE)
            sums, odd = warpgroup_mma_wait(0, deps=[sums, odd])
            acc = add_block(sums, scale, acc)
        if ODD:
            scale = block_scales(sp, STEPS - 1, STEPS, first, second, TILES, T, ACC)
            sums = _multiply(even, xs, slot, acc, 2, C, PARTS, True)
            sums, even = warpgroup_mma_wait(0, deps=[sums, even])
            acc = add_block(sums, scale, acc)
    else:
        for step in range(STEPS):
            ahead = step + STAGES - 1
            _refill(
                xs, held, tp, at, ahead, free, STEPS, CHUNKS, K, STAGES - 2,
                T, C, ELEMENT, SCALE, EVEN, PARTS,
            )  # fmt: skip
            if APART:
                scale = block_scales(sp, step, STEPS, first, second, TILES, T, ACC)
            w = operand(_load(held, slot, T, C, ELEMENT, SCALE), 0, 1, ACC, T, C, ELEMENT, SCALE)
            sums = warpgroup_mma_wait(0, deps=[_multiply(w, xs, slot, acc, 2, C, PARTS, APART)])
            if APART:
                acc = add_block(sums, scale, acc)
            else:
                acc = sums
            free = slot
            slot = next_slot(slot, STAGES)
    async_copy.wait_group(0)
    return acc
