"""The loop over K on Hopper for many tokens: those arrive a tile at a time by bulk copies, and codes go straight to
registers, two steps ahead. The same sums in the same order as `hopper_loop`'s, to the bit.

A warp that starts an instruction of a product waits until the one before it has begun, and then has that one's time
for other work. So a step is cut into pieces, and between the instructions of one of them a piece of the next step is
decoded. What all warps wait for, once a copy, is that the oldest slot of tokens is free.

A block of tokens that is the sum of two powers of two meets the same decoded weights in two products. Tuples are joined
by +, which is what Gluon knows.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from microscale.backends.triton.gluon_names import barrier, load_box
from microscale.backends.triton.hopper_decode import (
    accumulator,
    bits_of,
    operands,
    scales_layout,
    words_layout,
)
from microscale.backends.triton.hopper_fetch import fetch
from microscale.backends.triton.hopper_loop import (
    next_slot,
    ratio_at,
    ratio_pointers,
    rescaled,
    rescaled_last,
    scale_words,
    tile_of,
    wide_rows,
)


@gluon.constexpr_function
def main_of(BLOCK_M):
    """See `cuts.split`."""
    return 1 << BLOCK_M.bit_length() - 1


@gluon.constexpr_function
def rest_of(BLOCK_M):
    return BLOCK_M - (1 << BLOCK_M.bit_length() - 1)


@gluon.constexpr_function
def half_of(BLOCK_M):
    """See `cuts.tail_of`."""
    main = 1 << BLOCK_M.bit_length() - 1
    return main if main < BLOCK_M else main // 2


@gluon.constexpr_function
def pieces_of(C):
    """Of a step: 32 columns each, or 64."""
    return 4 if C == 4 else 2 * C


@gluon.constexpr_function
def _copied(C, BLOCK_M):
    """Chunks in a copy of tokens: a step's, or two steps', see `cuts.Cut.copied`."""
    return 2 * C if C == 1 and BLOCK_M < 256 else C


@gluon.constexpr_function
def _apart(SCALE, ODD):
    """1: the last two steps stand behind the loop. If their loop started the last products, ptxas would let no two be
    under way; not so for block FP8, which waits for all where a block ends, and would lose 3 %."""
    return int(not ODD and SCALE != "f32")


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
    more = words
    if BITS == 6:
        more = _words(codes, matrix, first, second, TILES, CHUNKS, step, 768, 512, T, C, 128, 2)
    SIZE: gl.constexpr = 32 * scale_words(SCALE)
    j = gl.arange(0, T * C * SIZE, scales_layout(T, C, gl.num_warps(), scale_words(SCALE)))
    tile = tile_of(j // (C * SIZE), first, second, TILES, T)
    chunk = gl.minimum(step * C + j // SIZE % C, CHUNKS - 1)
    scale = gl.load(
        scales + matrix * TILES * CHUNKS * SIZE + tile * (CHUNKS * SIZE) + chunk * SIZE + j % SIZE
    )
    return words, more, scale


@gluon.jit
def _expect(bars, copy, slot, COPIES, BLOCK_M: gl.constexpr, C: gl.constexpr):
    mbarrier.expect(bars.index(slot), BLOCK_M * _copied(C, BLOCK_M) * 128, pred=copy < COPIES)


@gluon.jit
def _copy(xs, bars, x, row, copy, slot, COPIES, BLOCK_M: gl.constexpr, C: gl.constexpr):
    here = copy < COPIES
    column = copy * (_copied(C, BLOCK_M) * 64)
    load_box(x[0], [row, column], bars.index(slot), xs[0].index(slot), pred=here)
    if rest_of(BLOCK_M):
        row = row + main_of(BLOCK_M)
        load_box(x[1], [row, column], bars.index(slot), xs[1].index(slot), pred=here)


@gluon.constexpr_function
def _groups(PIECES, BLOCK_M, C):
    """Of instructions, in so many pieces."""
    return PIECES * (2 if pieces_of(C) == 2 * C else 1) * (2 if rest_of(BLOCK_M) else 1)


@gluon.jit
def _wait(PENDING: gl.constexpr, accs, operands):
    """Until at most PENDING groups of instructions are under way; accs then stand for all that was started on them.

    Args:
        operands: of products that are done then.
    """
    done = warpgroup_mma_wait(PENDING, deps=accs + operands)
    if len(accs) == 2:
        return (done[0], done[1])
    elif len(operands) == 0:
        return (done,)
    else:
        return (done[0],)


@gluon.jit
def _rescaled(accs, ratio, by: gl.constexpr = rescaled):
    """Sums times a ratio for each row."""
    first = by(accs[0], ratio)
    if len(accs) == 2:
        ROWS: gl.constexpr = gl.SliceLayout(1, accs[1].type.layout)
        return (first, by(accs[1], gl.convert_layout(ratio, ROWS, assert_trivial=True)))
    else:
        return (first,)


@gluon.jit
def _multiply(w, xs, slot, acc, COLUMN: gl.constexpr, TOKENS: gl.constexpr):
    """Starts acc + w @ the slot's tokens, from a column on."""
    ACC: gl.constexpr = accumulator(TOKENS, gl.num_warps())
    WIDTH: gl.constexpr = w.shape[1]
    tokens = xs.index(slot).slice(COLUMN, WIDTH, dim=1)
    w = gl.convert_layout(w, gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)
    return warpgroup_mma(w, tokens.permute((1, 0)), acc, is_async=True)


@gluon.jit
def flat(pieces):
    """The operands of a step's pieces as one tuple."""
    found = pieces[0]
    for i in gl.static_range(1, len(pieces)):
        found = found + pieces[i]
    return found


@gluon.constexpr_function
def _blocks_end(C, PIECE, ODD_STEP):
    """Whether a piece of a step is the last one of 128 columns."""
    return (C * ODD_STEP + C * (PIECE + 1) / pieces_of(C)) % 2 == 0


@gluon.jit
def _rates(rp, step, CHUNKS, C: gl.constexpr, SCALE: gl.constexpr):
    """Block FP8: what the sums are multiplied by after each 128 columns that end in a step."""
    if SCALE != "f32":
        return (step,)
    elif C == 4:
        return (ratio_at(rp, 2 * step + 1, CHUNKS), ratio_at(rp, 2 * step + 2, CHUNKS))
    else:
        return (ratio_at(rp, (step + 1) * C // 2, CHUNKS),)


@gluon.jit
def _start(
    accs, pieces, xs, slot, PIECE: gl.constexpr, HALF: gl.constexpr, ODD_STEP: gl.constexpr,
    BLOCK_M: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """Starts the product of an operand of a piece of a step."""
    w = pieces[PIECE][HALF]
    STEP: gl.constexpr = 64 * ODD_STEP if _copied(C, BLOCK_M) > C else 0
    COLUMN: gl.constexpr = STEP + C * 64 // pieces_of(C) * PIECE + 16 * HALF
    sums = (_multiply(w, xs[0], slot, accs[0], COLUMN, main_of(BLOCK_M)),)
    if rest_of(BLOCK_M):
        sums = sums + (_multiply(w, xs[1], slot, accs[1], COLUMN, rest_of(BLOCK_M)),)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@gluon.jit
def _exchange(
    xs, bars, x, row, where, step, slot, COPIES, ODD_STEP: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr,
    C: gl.constexpr, STAGES: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Asks for later tokens, into the slot that the step before `step` left, and waits for those of the next step.

    Where a copy is two steps', the first of them asks, and the second waits.

    Returns:
        The slot of the next step.
    """
    WIDTH: gl.constexpr = _copied(C, BLOCK_M)
    codes, scales, matrix, first, second, TILES, CHUNKS = where
    copy = step * C // WIDTH
    if C == WIDTH or ODD_STEP == 0:
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        ahead = copy + STAGES - 1
        _expect(bars, ahead, free, COPIES, BLOCK_M, C)
        barrier()  # all are done with the slot
        _copy(xs, bars, x, row, ahead, free, COPIES, BLOCK_M, C)
        if AHEAD > 1:
            later = copy + AHEAD * C // WIDTH
            fetch(codes, scales, matrix, first, second, TILES, CHUNKS, later, T, WIDTH, ELEMENT, SCALE)
    following = slot
    if C == WIDTH or ODD_STEP == 1:
        following = next_slot(slot, STAGES)
        mbarrier.wait(bars.index(following), (copy + 1) // STAGES % 2, pred=copy + 1 < COPIES)
    return following


@gluon.jit
def _advance(
    accs, now, before, rates, weights, xs, bars, x, row, where, step, slot, COPIES, ODD_STEP: gl.constexpr,
    ACC: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Multiplies a step and decodes the next one beside it.

    Args:
        now, rates: operands and rates of `step`; before: operands of the step before, which may be under way.
        weights: of the next step.
        where: what `_weights` takes before the step.
    Returns:
        accs, of which all but the last pieces' products may be under way; operands of the next step; its slot.
    """
    PIECES: gl.constexpr = pieces_of(C)
    ONE: gl.constexpr = _groups(1, BLOCK_M, C)
    HALVES: gl.constexpr = 2 if PIECES == 2 * C else 1
    at = (step, slot, COPIES, ODD_STEP)
    following = slot
    after = ()
    for i in gl.static_range(PIECES):
        accs = _start(accs, now, xs, slot, i, 0, ODD_STEP, BLOCK_M, C)
        if i == 0 and HALVES == 2:  # the first piece of the step before is done with, for its registers
            accs = _wait(ONE * (PIECES - 1) + ONE // 2, accs, before[0])
        elif i == 0:
            accs = _wait(ONE, accs, flat(before))
            following = _exchange(xs, bars, x, row, where, *at, BLOCK_M, T, C, STAGES, ELEMENT, SCALE, AHEAD)
        piece = operands(weights, i, PIECES, ACC, T, C, ELEMENT, SCALE)
        after = after + (piece,)  # type: ignore[assignment]  # noqa: RUF005
        if HALVES == 2:
            accs = _start(accs, now, xs, slot, i, 1, ODD_STEP, BLOCK_M, C)
        if i == 0 and HALVES == 2:
            accs = _wait(ONE, accs, flat(before))
            following = _exchange(xs, bars, x, row, where, *at, BLOCK_M, T, C, STAGES, ELEMENT, SCALE, AHEAD)
        if SCALE == "f32" and _blocks_end(C, i, ODD_STEP):
            # No product may be under way, or the compiler lets none be under way anywhere.
            accs = _rescaled(_wait(0, accs, flat(now)), rates[i * len(rates) // PIECES])
    if SCALE != "f32" or not _blocks_end(C, PIECES - 1, ODD_STEP):
        accs = _wait(ONE * PIECES, accs, ())
    return accs, after, following


@gluon.jit
def _finish(
    accs, now, rates, xs, slot, ODD_STEP: gl.constexpr, BLOCK_M: gl.constexpr, C: gl.constexpr, SCALE: gl.constexpr
):  # fmt: skip
    """Starts the products of the last step, with nothing decoded beside them. Its last rate is the caller's."""
    for i in gl.static_range(pieces_of(C)):
        for half in gl.static_range(len(now[0])):
            accs = _start(accs, now, xs, slot, i, half, ODD_STEP, BLOCK_M, C)
        if SCALE == "f32" and C == 4 and i == 1:
            accs = _rescaled(_wait(0, accs, flat(now)), rates[0])
    return accs


@gluon.jit
def product(
    x, row, codes, scales, ratios, matrix, first, second, TILES, STEPS, CHUNKS,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr,
    STAGES: gl.constexpr, ODD: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """Tuple of float32 [T * 64, tokens], slots of rows, for one or both of `cuts.split`'s numbers of tokens.

    Args:
        x: descriptors of bfloat16 [*, K] in blocks of so many tokens and a copy's columns; row: the first of the block.
        ratios, matrix, first, second: as in `hopper_loop.product`.
    """
    MAIN: gl.constexpr = main_of(BLOCK_M)
    REST: gl.constexpr = rest_of(BLOCK_M)
    ACC: gl.constexpr = accumulator(MAIN, gl.num_warps())
    WIDTH: gl.constexpr = _copied(C, BLOCK_M) * 64
    XS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([MAIN, WIDTH], gl.bfloat16)
    PIECES: gl.constexpr = pieces_of(C)
    APART: gl.constexpr = _apart(SCALE, ODD)
    xs = (gl.allocate_shared_memory(gl.bfloat16, [STAGES, MAIN, WIDTH], XS),)
    accs = (gl.zeros([T * 64, MAIN], gl.float32, ACC),)
    if REST:
        RS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([REST, WIDTH], gl.bfloat16)
        xs = xs + (gl.allocate_shared_memory(gl.bfloat16, [STAGES, REST, WIDTH], RS),)  # type: ignore[assignment]  # noqa: RUF005
        accs = accs + (gl.zeros([T * 64, REST], gl.float32, accumulator(REST, gl.num_warps())),)  # type: ignore[assignment]  # noqa: RUF005
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    COPIES = gl.cdiv(STEPS * C, _copied(C, BLOCK_M))
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    for s in gl.static_range(STAGES - 1):
        _expect(bars, s, s, COPIES, BLOCK_M, C)
        _copy(xs, bars, x, row, s, s, COPIES, BLOCK_M, C)
    rp = ratios
    if SCALE == "f32":
        rp = ratio_pointers(ratios, matrix, first, second, TILES, CHUNKS, T, ACC)
    where = (codes, scales, matrix, first, second, TILES, CHUNKS)
    weights = _weights(codes, scales, matrix, first, second, TILES, CHUNKS, 0, T, C, ELEMENT, SCALE)
    even_rates = _rates(rp, 0, CHUNKS, C, SCALE)
    odd_rates = _rates(rp, 1, CHUNKS, C, SCALE)
    odd_weights = _weights(codes, scales, matrix, first, second, TILES, CHUNKS, 1, T, C, ELEMENT, SCALE)
    even = (operands(weights, 0, PIECES, ACC, T, C, ELEMENT, SCALE),)
    for i in gl.static_range(1, PIECES):
        piece = operands(weights, i, PIECES, ACC, T, C, ELEMENT, SCALE)
        even = even + (piece,)  # type: ignore[assignment]  # noqa: RUF005
    even_weights = _weights(codes, scales, matrix, first, second, TILES, CHUNKS, 2, T, C, ELEMENT, SCALE)
    odd = even
    slot = 0
    mbarrier.wait(bars.index(0), 0)
    # Two steps a turn, so that no register is copied while a product reads it.
    for turn in range(STEPS // 2 - APART):
        step = 2 * turn
        accs, odd, slot = _advance(
            accs, even, odd, even_rates, odd_weights, xs, bars, x, row, where, step, slot, COPIES, 0,
            ACC, BLOCK_M, T, C, STAGES, ELEMENT, SCALE, AHEAD,
        )  # fmt: skip
        even_rates = _rates(rp, step + 2, CHUNKS, C, SCALE)
        odd_weights = _weights(
            codes, scales, matrix, first, second, TILES, CHUNKS, step + 3, T, C, ELEMENT, SCALE
        )
        accs, even, slot = _advance(
            accs, odd, even, odd_rates, even_weights, xs, bars, x, row, where, step + 1, slot, COPIES, 1,
            ACC, BLOCK_M, T, C, STAGES, ELEMENT, SCALE, AHEAD,
        )  # fmt: skip
        odd_rates = _rates(rp, step + 3, CHUNKS, C, SCALE)
        even_weights = _weights(
            codes, scales, matrix, first, second, TILES, CHUNKS, step + 4, T, C, ELEMENT, SCALE
        )
    if ODD:
        accs = _finish(accs, even, even_rates, xs, slot, 0, BLOCK_M, C, SCALE)
    elif APART:
        accs, odd, slot = _advance(
            accs, even, odd, even_rates, odd_weights, xs, bars, x, row, where, STEPS - 2, slot, COPIES, 0,
            ACC, BLOCK_M, T, C, STAGES, ELEMENT, SCALE, AHEAD,
        )  # fmt: skip
        accs = _finish(accs, odd, odd_rates, xs, slot, 1, BLOCK_M, C, SCALE)
    accs = _wait(0, accs, flat(even) + flat(odd))
    if SCALE == "f32":
        accs = _rescaled(accs, gl.load(rp + gl.cdiv(CHUNKS, 2)), rescaled_last)
    barrier()
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(s))
    return accs
