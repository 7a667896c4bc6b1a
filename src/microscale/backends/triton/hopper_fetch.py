"""Asking for weights before they are read, on Hopper: lines of memory that should be in the L2 cache by then.

A request changes nothing and waits for nothing, so it may also come before the kernel ahead of this one has ended.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from microscale.backends.triton.hopper_decode import bits_of
from microscale.backends.triton.hopper_loop import scale_words, tile_of


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


@gluon.constexpr_function
def _lines(ELEMENT):
    """Of 128 bytes in a tile's codes; a power of two."""
    return 16 if bits_of(ELEMENT) == 4 else 32


@gluon.jit
def _fetch(
    words, matrix, first, second, TILES, CHUNKS, step, STRIDE: gl.constexpr, LINES: gl.constexpr,
    T: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """STRIDE words of each tile and chunk of a step."""
    i = gl.arange(0, T * C * LINES, _lines_layout(T * C * LINES, gl.num_warps()))
    tile = tile_of(i // (C * LINES), first, second, TILES, T)
    chunk = gl.minimum(step * C + i // LINES % C, CHUNKS - 1)
    within = gl.minimum(i % LINES * 32, STRIDE - 32)
    pointer = words + matrix * TILES * CHUNKS * STRIDE + (tile * (CHUNKS * STRIDE) + chunk * STRIDE + within)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [pointer], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def fetch(
    codes, scales, matrix, first, second, TILES, CHUNKS, step,
    T: gl.constexpr, C: gl.constexpr, ELEMENT: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """Asks for a step's codes and scales, past the last chunk for that one again; see `hopper_loop.pointers`."""
    BITS: gl.constexpr = bits_of(ELEMENT)
    _fetch(codes, matrix, first, second, TILES, CHUNKS, step, 128 * BITS, _lines(ELEMENT), T, C)
    WORDS: gl.constexpr = scale_words(SCALE)
    _fetch(scales, matrix, first, second, TILES, CHUNKS, step, 32 * WORDS, WORDS, T, C)
