"""The loop over K on Hopper: codes, scales and tokens arrive by asynchronous copies, several steps ahead.

Weights are wgmma's left operand, in registers; tokens its right one, in shared memory. One program walks all of K in
steps of 16, whatever its sizes, so a token's result depends, to the bit, on no other token. Block FP8's sums are
rescaled before every 128 columns, see `fragments.Fragments.ratios`: then they are waited for.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from microscale.backends.triton.gluon_names import barrier, load_shared
from microscale.backends.triton.hopper_decode import (
    accumulator,
    bits_of,
    operand,
    scales_layout,
    words_layout,
)


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
    ds = cs
    if bits_of(ELEMENT) == 6:
        ds = gl.allocate_shared_memory(
            gl.int32, [STAGES, T * C * 128, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
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
    """Where a program's codes, their further bits and its scales of step 0 lie.

    Args:
        matrix: int64, the expert; first, second: number of the first tile, and of the one that half way follows.
    """
    BITS: gl.constexpr = bits_of(ELEMENT)
    cp = _pointers(codes, matrix, first, second, TILES, CHUNKS, 128 * BITS, 0, T, C, wide_rows(ELEMENT), 4)
    dp = cp
    if BITS == 6:
        dp = _pointers(codes, matrix, first, second, TILES, CHUNKS, 768, 512, T, C, 128, 2)
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
    load_shared(buffer.index(slot), pointer + step * (C * STRIDE), mask=mask)


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
    WORDS: gl.constexpr = scale_words(SCALE)
    if EVEN:
        mask = step < STEPS
    else:
        LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
        j = gl.arange(0, T * C * 32 * WORDS, LAYOUT)
        mask = step * C + j // (32 * WORDS) % C < CHUNKS
    load_shared(ss.index(slot), sp + step * (C * 32 * WORDS), mask=mask)


@gluon.jit
def _copy_tokens(
    xs, token_pointers, real, step, slot, STEPS, K,
    C: gl.constexpr, EVEN: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    if EVEN:
        mask = step < STEPS
    else:
        WARPS: gl.constexpr = gl.num_warps()
        TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
        mask = (step * (C * 64) + gl.arange(0, C * 64, gl.SliceLayout(0, TOKENS)) < K)[None, :]
    if real is not None:
        mask = real[:, None] & mask
    for p in gl.static_range(PARTS):
        load_shared(xs.index(slot * PARTS + p), token_pointers + (p * K + step * (C * 64)), mask=mask)


@gluon.jit
def _load(held, slot, T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr):
    """One slot's weights as they are: codes, their further bits, scales."""
    WARPS: gl.constexpr = gl.num_warps()
    cs, ds, ss = held
    words = cs.index(slot).load(words_layout(T, C, WARPS, wide_rows(ELEMENT), 4))
    more = words
    if bits_of(ELEMENT) == 6:
        more = ds.index(slot).load(words_layout(T, C, WARPS, 128, 2))
    return words, more, ss.index(slot).load(scales_layout(T, C, WARPS, scale_words(SCALE)))


@gluon.jit
def _multiply(w, xs, slot, acc, HALF: gl.constexpr, C: gl.constexpr, PARTS: gl.constexpr):
    """Starts acc + w @ a half of the slot's tokens, or 2: all: PARTS groups of instructions."""
    sums = acc
    for p in gl.static_range(PARTS):
        x = xs.index(slot * PARTS + p)
        if HALF < 2:
            x = x.slice(HALF * (C * 32), C * 32, dim=1)
        sums = warpgroup_mma(w, x.permute((1, 0)), sums, is_async=True)
    return sums


@gluon.jit
def next_slot(slot, STAGES: gl.constexpr):
    return gl.where(slot == STAGES - 1, 0, slot + 1)


@gluon.jit
def _refill(
    xs, held, token_pointers, real, at, step, slot, STEPS, CHUNKS, K, PENDING: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr, EVEN: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """`step` into a slot that this thread is done with; all but the last PENDING steps asked for are here then."""
    async_copy.wait_group(PENDING)
    # Here for all threads, and all are done with the slot.
    barrier()
    copy_weights(held, at, step, slot, STEPS, CHUNKS, T, C, ELEMENT, SCALE, EVEN)
    _copy_tokens(xs, token_pointers, real, step, slot, STEPS, K, C, EVEN, PARTS)
    async_copy.commit_group()


@gluon.jit
def ratio_pointers(ratios, matrix, first, second, TILES, CHUNKS, T: gl.constexpr, ACC: gl.constexpr):
    """Block FP8: [T * 64], where each row's ratio before the first block is. Two tiles of rows share one."""
    i = gl.arange(0, T * 64, gl.SliceLayout(1, ACC))
    row = matrix * gl.cdiv(TILES, 2) + tile_of(i // 64, first, second, TILES, T) // 2
    return ratios + row * (gl.cdiv(CHUNKS, 2) + 1)


@gluon.jit
def ratio_at(rp, block, CHUNKS):
    """What sums are multiplied by before a block of 128 columns; past the end 1."""
    return gl.load(rp + block, mask=rp.to(gl.int64) * 0 + block < gl.cdiv(CHUNKS, 2), other=1.0)


@gluon.jit
def rescaled(acc, ratio):
    """[rows, tokens] times [rows]."""
    return acc * gl.broadcast(ratio[:, None], acc)[0]


@gluon.jit
def rescaled_last(acc, ratio):
    """The same behind the last product, rounded: a compiler may fuse `*` with what is added to it next, and then gives
    other bits than in kernels in which it does not."""
    factor = gl.broadcast(ratio[:, None], acc)[0]
    return gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [acc, factor], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def product(
    x, rows, real, held, at, ratios, matrix, first, second, TILES, STEPS, CHUNKS, K,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, EVEN: gl.constexpr,
    BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, ODD: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """float32 [T * 64, BLOCK_M], slots of rows. The weights of the first STAGES - 1 steps are on their way.

    Args:
        x: bfloat16 [*, PARTS, K], activations as a sum of parts; rows: int64 [BLOCK_M].
        real: which of these are tokens, nothing being copied of others; None: all are, or repeat them.
        held, at: as in `copy_weights`; ratios: of all matrices; matrix, first, second, TILES: as in `pointers`.
    """
    WARPS: gl.constexpr = gl.num_warps()
    ACC: gl.constexpr = accumulator(BLOCK_M, WARPS)
    TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
    XS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, C * 64], gl.bfloat16)
    BLOCKS: gl.constexpr = SCALE == "f32"
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * PARTS, BLOCK_M, C * 64], XS)
    rp = ratios
    if BLOCKS:
        rp = ratio_pointers(ratios, matrix, first, second, TILES, CHUNKS, T, ACC)
        # After the last half of a turn, and before the others that begin a block; asked for a turn before it is needed.
        ratio0 = ratio_at(rp, C if OVERLAP else 0, CHUNKS)
        ratio1, ratio2, ratio3 = ratio0, ratio0, ratio0
        if C > 1:
            ratio2 = ratio_at(rp, C // 2, CHUNKS)
        if C == 4:
            ratio1, ratio3 = ratio_at(rp, 1, CHUNKS), ratio_at(rp, 3, CHUNKS)
    tp = x + rows[:, None] * (PARTS * K) + gl.arange(0, C * 64, gl.SliceLayout(0, TOKENS))[None, :]
    for s in gl.static_range(STAGES - 1):
        _copy_tokens(xs, tp, real, s, s, STEPS, K, C, EVEN, PARTS)
        async_copy.commit_group()
    acc = gl.zeros([T * 64, BLOCK_M], gl.float32, ACC)
    slot, free = 0, STAGES - 1
    if OVERLAP:
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
            sums = _multiply(even0, xs, slot, acc, 0, C, PARTS)
            acc, odd0, odd1 = warpgroup_mma_wait(PARTS, deps=[sums, odd0, odd1])
            _refill(
                xs, held, tp, real, at, ahead, free, STEPS, CHUNKS, K, STAGES - 3,
                T, C, ELEMENT, SCALE, EVEN, PARTS,
            )  # fmt: skip
            free = slot
            slot = next_slot(slot, STAGES)
            loaded = _load(held, slot, T, C, ELEMENT, SCALE)
            odd0 = operand(loaded, 0, 2, ACC, T, C, ELEMENT, SCALE)
            if BLOCKS and C == 4:
                acc, even0 = warpgroup_mma_wait(0, deps=[acc, even0])
                acc = rescaled(acc, ratio1)
                ratio1 = ratio_at(rp, (turn + 1) * C + 1, CHUNKS)
            acc = _multiply(even1, xs, free, acc, 1, C, PARTS)
            odd1 = operand(loaded, 1, 2, ACC, T, C, ELEMENT, SCALE)
            if BLOCKS and C > 1:
                acc, even0, even1 = warpgroup_mma_wait(0, deps=[acc, even0, even1])
                acc = rescaled(acc, ratio2)
                ratio2 = ratio_at(rp, (turn + 1) * C + C // 2, CHUNKS)
            sums = _multiply(odd0, xs, slot, acc, 0, C, PARTS)
            acc, even0, even1 = warpgroup_mma_wait(PARTS, deps=[sums, even0, even1])
            _refill(
                xs, held, tp, real, at, ahead + 1, free, STEPS, CHUNKS, K, STAGES - 3,
                T, C, ELEMENT, SCALE, EVEN, PARTS,
            )  # fmt: skip
            free = slot
            slot = next_slot(slot, STAGES)
            loaded = _load(held, slot, T, C, ELEMENT, SCALE)
            even0 = operand(loaded, 0, 2, ACC, T, C, ELEMENT, SCALE)
            if BLOCKS and C == 4:
                acc, odd0 = warpgroup_mma_wait(0, deps=[acc, odd0])
                acc = rescaled(acc, ratio3)
                ratio3 = ratio_at(rp, (turn + 1) * C + 3, CHUNKS)
            sums = _multiply(odd1, xs, free, acc, 1, C, PARTS)
            acc = warpgroup_mma_wait(2 * PARTS, deps=[sums])
            even1 = operand(loaded, 1, 2, ACC, T, C, ELEMENT, SCALE)
            if BLOCKS:
                # No product may be under way here, or the compiler lets none be under way anywhere.
                acc, odd0, odd1 = warpgroup_mma_wait(0, deps=[acc, odd0, odd1])
                acc = rescaled(acc, ratio0)
                ratio0 = ratio_at(rp, (turn + 2) * C, CHUNKS)
        if ODD:
            acc = _multiply(even0, xs, slot, acc, 0, C, PARTS)
            if BLOCKS and C == 4:
                acc, even0 = warpgroup_mma_wait(0, deps=[acc, even0])
                acc = rescaled(acc, ratio1)
            acc = _multiply(even1, xs, slot, acc, 1, C, PARTS)
        acc, even0, even1, odd0, odd1 = warpgroup_mma_wait(0, deps=[acc, even0, even1, odd0, odd1])
    else:
        HALVES: gl.constexpr = 2 if BLOCKS and C == 4 else 1
        for step in range(STEPS):
            ahead = step + STAGES - 1
            _refill(
                xs, held, tp, real, at, ahead, free, STEPS, CHUNKS, K, STAGES - 2,
                T, C, ELEMENT, SCALE, EVEN, PARTS,
            )  # fmt: skip
            loaded = _load(held, slot, T, C, ELEMENT, SCALE)
            for half in gl.static_range(HALVES):
                if BLOCKS:
                    if C == 1:
                        acc = rescaled(acc, gl.where(step % 2 == 0, ratio0, 1.0))
                        ratio0 = ratio_at(rp, (step + 1) // 2, CHUNKS)
                    elif half == 0:
                        acc = rescaled(acc, ratio0)
                        ratio0 = ratio_at(rp, (step + 1) * C // 2, CHUNKS)
                    else:
                        acc = rescaled(acc, ratio1)
                        ratio1 = ratio_at(rp, (step + 1) * C // 2 + 1, CHUNKS)
                w = operand(loaded, half, HALVES, ACC, T, C, ELEMENT, SCALE)
                sums = _multiply(w, xs, slot, acc, half if HALVES == 2 else 2, C, PARTS)
                acc = warpgroup_mma_wait(0, deps=[sums])
            free = slot
            slot = next_slot(slot, STAGES)
    async_copy.wait_group(0)
    if BLOCKS:
        acc = rescaled_last(acc, gl.load(rp + gl.cdiv(CHUNKS, 2)))
    return acc
