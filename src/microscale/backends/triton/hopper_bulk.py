"""The loop over K on Hopper for many tokens: those arrive a tile at a time by bulk copies, and codes go straight to
registers, two steps ahead. The same sums in the same order as `hopper_loop`'s, to the bit.

A warp that starts a product waits until the one before it has begun, and then has that one's time for other work. So
a step is cut into pieces, and between the products of two of them a piece of the next step is decoded. What all warps
wait for, once a step, is that the oldest slot of tokens is free. Tuples are joined by +, which is what Gluon knows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from microscale.backends.triton.hopper_decode import (
    accumulator,
    bits_of,
    operand,
    scales_layout,
    words_layout,
)
from microscale.backends.triton.hopper_loop import (
    add_block,
    barrier,
    block_scales,
    next_slot,
    scale_words,
    tile_of,
    wide_rows,
)


@gluon.constexpr_function
def pieces_of(C):
    """Of a step: 32 columns each, or 64."""
    return 4 if C == 4 else 2 * C


@gluon.constexpr_function
def _lines_layout(COUNT, WARPS):
    """Of COUNT lines of memory, a share for each warp; what a share leaves of a warp repeats it."""
    share = max(COUNT // WARPS, 1)
    lanes = [1 << i if 1 << i < share else 0 for i in range(5)]
    warps = [share << i if share << i < COUNT else 0 for i in range(WARPS.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[32 << i] for i in range(max(share // 32, 1).bit_length() - 1)],
        [[b] for b in lanes],
        [[b] for b in warps],
        [],
        [COUNT],
    )


@gluon.jit
def _fetch(
    words, matrix, first, second, TILES, CHUNKS, step, STRIDE: gl.constexpr, LINES: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Asks for what `_words` will read of a step, STRIDE words of each tile and chunk, to be in the cache by then."""
    i = gl.arange(0, T * C * LINES, _lines_layout(T * C * LINES, gl.num_warps()))
    tile = tile_of(i // (C * LINES), first, second, TILES, T)
    chunk = gl.minimum(step * C + i // LINES % C, CHUNKS - 1)
    within = gl.minimum(i % LINES * 32, STRIDE - 32)
    pointer = words + matrix * TILES * CHUNKS * STRIDE + (tile * (CHUNKS * STRIDE) + chunk * STRIDE + within)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [pointer], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def _lines(ELEMENT):
    """Of 128 bytes in a tile's codes; a power of two."""
    return 16 if bits_of(ELEMENT) == 4 else 32


@gluon.jit
def _words(
    codes, matrix, first, second, TILES, CHUNKS, step, STRIDE: gl.constexpr, FIRST: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """int32 [T * C * ROWS, WIDTH] of a step, from word FIRST of STRIDE, of each tile and chunk.

    Past the last chunk that one again: finite numbers, for tokens that are 0 there.
    """
    LAYOUT: gl.constexpr = words_layout(T, C, gl.num_warps(), ROWS, WIDTH)
    i = gl.arange(0, T * C * ROWS, gl.SliceLayout(1, LAYOUT))
    tile = tile_of(i // (C * ROWS), first, second, TILES, T)
    chunk = gl.minimum(step * C + i // ROWS % C, CHUNKS - 1)
    offset = tile * (CHUNKS * STRIDE) + chunk * STRIDE + FIRST + i % ROWS * WIDTH
    within = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    return gl.load(codes + matrix * TILES * CHUNKS * STRIDE + offset[:, None] + within[None, :])


@gluon.jit
def _weights(
    codes, scales, matrix, first, second, TILES, CHUNKS, step,
    T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """A step's codes, their further bits and scales, as `hopper_decode.operand` takes them."""
    BITS: gl.constexpr = bits_of(ELEMENT)
    ROWS: gl.constexpr = wide_rows(ELEMENT)
    words = _words(codes, matrix, first, second, TILES, CHUNKS, step, 128 * BITS, 0, T, C, ROWS, 4)
    more, scale = words, words
    if BITS == 6:
        more = _words(codes, matrix, first, second, TILES, CHUNKS, step, 768, 512, T, C, 128, 2)
    if SCALE != "f32":
        SIZE: gl.constexpr = 32 * scale_words(SCALE)
        j = gl.arange(0, T * C * SIZE, scales_layout(T, C, gl.num_warps(), scale_words(SCALE)))
        tile = tile_of(j // (C * SIZE), first, second, TILES, T)
        chunk = gl.minimum(step * C + j // SIZE % C, CHUNKS - 1)
        scale = gl.load(
            scales + matrix * TILES * CHUNKS * SIZE + tile * (CHUNKS * SIZE) + chunk * SIZE + j % SIZE
        )
    return words, more, scale


@gluon.jit
def _expect(bars, step, slot, STEPS, BLOCK_M: gl.constexpr, C: gl.constexpr):
    mbarrier.expect(bars.index(slot), BLOCK_M * C * 128, pred=step < STEPS)


@gluon.jit
def _copy(xs, bars, x, row, step, slot, STEPS, C: gl.constexpr):
    tma.async_copy_global_to_shared(
        x, [row, step * (C * 64)], bars.index(slot), xs.index(slot), pred=step < STEPS
    )


@gluon.jit
def _multiply(w, xs, slot, acc, PIECE: gl.constexpr, C: gl.constexpr, FRESH: gl.constexpr):
    """Starts acc + w @ a piece of the slot's tokens; FRESH: without acc."""
    WIDTH: gl.constexpr = C * 64 // pieces_of(C)
    tokens = xs.index(slot).slice(PIECE * WIDTH, WIDTH, dim=1)
    return warpgroup_mma(w, tokens.permute((1, 0)), acc, use_acc=not FRESH, is_async=True)


@gluon.jit
def _advance(
    acc, now, before, weights, xs, bars, x, row, where, step, slot, STEPS,
    ACC: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Multiplies a step and decodes the next one beside it.

    Args:
        now: operands of `step`; before: of the step before, which may be under way; weights: of the next one.
        where: what `_weights` takes before the step.
    Returns:
        acc, of which all but the last pieces' products may be under way; operands of the next step; its slot.
    """
    PIECES: gl.constexpr = pieces_of(C)
    APART: gl.constexpr = SCALE == "f32"
    codes, scales, matrix, first, second, TILES, CHUNKS = where
    sums = _multiply(now[0], xs, slot, acc, 0, C, APART)
    if APART:
        scale = block_scales(scales, step, STEPS, first, second, TILES, T, ACC)
    else:
        done = warpgroup_mma_wait(1, deps=(sums,) + before)  # noqa: RUF005
        sums = done[0]
    free = gl.where(slot == 0, STAGES - 1, slot - 1)
    ahead = step + STAGES - 1
    _expect(bars, ahead, free, STEPS, BLOCK_M, C)
    barrier()  # all are done with the slot
    _copy(xs, bars, x, row, ahead, free, STEPS, C)
    if AHEAD > 1:
        BITS: gl.constexpr = bits_of(ELEMENT)
        _fetch(codes, matrix, first, second, TILES, CHUNKS, step + AHEAD, 128 * BITS, _lines(ELEMENT), T, C)
        if not APART:
            WORDS: gl.constexpr = scale_words(SCALE)
            _fetch(scales, matrix, first, second, TILES, CHUNKS, step + AHEAD, 32 * WORDS, WORDS, T, C)
    following = next_slot(slot, STAGES)
    mbarrier.wait(bars.index(following), (step + 1) // STAGES % 2, pred=step + 1 < STEPS)
    after = (operand(weights, 0, PIECES, ACC, T, C, ELEMENT, SCALE),)
    for i in gl.static_range(1, PIECES):
        sums = _multiply(now[i], xs, slot, sums, i, C, False)
        piece = operand(weights, i, PIECES, ACC, T, C, ELEMENT, SCALE)
        after = after + (piece,)  # type: ignore[assignment]  # noqa: RUF005
    if APART:
        done = warpgroup_mma_wait(0, deps=(sums,) + now)  # noqa: RUF005
        acc = add_block(done[0], scale, acc)
    else:
        acc = warpgroup_mma_wait(PIECES, deps=[sums])
    return acc, after, following


@gluon.jit
def product(
    x, row, codes, scales, matrix, first, second, TILES, STEPS, CHUNKS,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, ODD: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """float32 [T * 64, BLOCK_M], slots of rows.

    Args:
        x: a descriptor of bfloat16 [*, K] in blocks of [BLOCK_M, C * 64]; row: the first of the block.
        matrix, first, second: as in `hopper_loop.pointers`.
    """
    ACC: gl.constexpr = accumulator(BLOCK_M, gl.num_warps())
    XS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, C * 64], gl.bfloat16)
    PIECES: gl.constexpr = pieces_of(C)
    APART: gl.constexpr = SCALE == "f32"
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, C * 64], XS)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    for s in gl.static_range(STAGES - 1):
        _expect(bars, s, s, STEPS, BLOCK_M, C)
        _copy(xs, bars, x, row, s, s, STEPS, C)
    if APART:
        scales = scales + matrix * (gl.cdiv(TILES, 2) * STEPS)
    where = (codes, scales, matrix, first, second, TILES, CHUNKS)
    weights = _weights(codes, scales, matrix, first, second, TILES, CHUNKS, 0, T, C, ELEMENT, SCALE)
    odd_weights = _weights(codes, scales, matrix, first, second, TILES, CHUNKS, 1, T, C, ELEMENT, SCALE)
    even = (operand(weights, 0, PIECES, ACC, T, C, ELEMENT, SCALE),)
    for i in gl.static_range(1, PIECES):
        piece = operand(weights, i, PIECES, ACC, T, C, ELEMENT, SCALE)
        even = even + (piece,)  # type: ignore[assignment]  # noqa: RUF005
    even_weights = _weights(codes, scales, matrix, first, second, TILES, CHUNKS, 2, T, C, ELEMENT, SCALE)
    acc = gl.zeros([T * 64, BLOCK_M], gl.float32, ACC)
    odd = even
    slot = 0
    mbarrier.wait(bars.index(0), 0)
    # Two steps a turn, so that no register is copied while a product reads it.
    for turn in range(STEPS // 2):
        step = 2 * turn
        acc, odd, slot = _advance(
            acc, even, odd, odd_weights, xs, bars, x, row, where, step, slot, STEPS,
            ACC, BLOCK_M, T, C, STAGES, ELEMENT, SCALE, AHEAD,
        )  # fmt: skip
        odd_weights = _weights(
            codes, scales, matrix, first, second, TILES, CHUNKS, step + 3, T, C, ELEMENT, SCALE
        )
        acc, even, slot = _advance(
            acc, odd, even, even_weights, xs, bars, x, row, where, step + 1, slot, STEPS,
            ACC, BLOCK_M, T, C, STAGES, ELEMENT, SCALE, AHEAD,
        )  # fmt: skip
        even_weights = _weights(
            codes, scales, matrix, first, second, TILES, CHUNKS, step + 4, T, C, ELEMENT, SCALE
        )
    if ODD:
        sums = _multiply(even[0], xs, slot, acc, 0, C, APART)
        for i in gl.static_range(1, PIECES):
            sums = _multiply(even[i], xs, slot, sums, i, C, False)
        if APART:
            scale = block_scales(scales, STEPS - 1, STEPS, first, second, TILES, T, ACC)
            done = warpgroup_mma_wait(0, deps=(sums,) + even)  # noqa: RUF005
            acc = add_block(done[0], scale, acc)
        else:
            done = warpgroup_mma_wait(0, deps=(sums,) + even + odd)  # noqa: RUF005
            acc = done[0]
    else:
        done = warpgroup_mma_wait(0, deps=(acc,) + even + odd)  # noqa: RUF005
        acc = done[0]
    barrier()
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(s))
    return acc
