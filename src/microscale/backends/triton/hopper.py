"""Linear on Hopper (sm_90), in Gluon: layouts are given, so that decoded weights go from registers
into the matrix unit and nothing decoded passes through shared memory. See `hopper_loop`.

The matrix unit takes bfloat16. Wider activations go in as the exact sum of two (float16) or three (float32) bfloat16
numbers, which meet the same decoded weights in the same sum: one copy of the weights serves every dtype.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton import cuts, hopper_bulk, hopper_linear, hopper_wide, tiles
from microscale.backends.triton.cuts import Cut, split, tail_of
from microscale.backends.triton.fragments import Fragments
from microscale.backends.triton.hopper_bulk import main_of, rest_of
from microscale.backends.triton.hopper_decode import accumulator, finish, in_order, slots, store_layout
from microscale.backends.triton.hopper_fetch import fetch
from microscale.backends.triton.hopper_loop import buffers, copy_weights, pointers, product

# Of a program's chunks, those that it asks for before the kernel ahead of it has ended.
EARLY = 16
# Tokens up to which programs copy nothing into the places of those that are not there. Of more these take some again,
# each a few times: a line that all programs read very often is what they would wait for, but to ask takes time as well.
_ASKED = 2
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@gluon.jit
def _store(
    y, acc, first, second, token, row_scale, bias, M, N,
    ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr, TOKENS: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Sums of TOKENS tokens from `token` on, to where they belong."""
    WARPS: gl.constexpr = gl.num_warps()
    rows = gl.minimum(slots(first, second, T, gl.SliceLayout(1, accumulator(TOKENS, WARPS))), N - 1)
    acc = finish(acc, row_scale, bias, rows, ROW_SCALE, HAS_BIAS)
    STORE: gl.constexpr = store_layout(T * 64, TOKENS, WARPS)
    out = gl.convert_layout(in_order(acc.to(y.dtype.element_ty), T, TOKENS), STORE)
    n = first * 64 + gl.arange(0, T * 64, gl.SliceLayout(1, STORE))
    m = token + gl.arange(0, TOKENS, gl.SliceLayout(0, STORE))
    gl.store(y + m.to(gl.int64)[None, :] * N + n[:, None], out, mask=(n < N)[:, None] & (m < M)[None, :])


@gluon.jit(do_not_specialize=["M", "TILES", "CHUNKS", "STEPS"])
def _linear_kernel(
    y, x, x_rest, codes, scales, ratios, row_scale, bias, M, N, K, TILES, CHUNKS, STEPS,
    ELEMENT: gl.constexpr, SCALE: gl.constexpr, EVEN: gl.constexpr, ROW_SCALE: gl.constexpr, HAS_BIAS: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, T: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, ODD: gl.constexpr, PARTS: gl.constexpr, ALL: gl.constexpr, BULK: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    # GROUP blocks of tokens take turns with the rows, so that both are found in the cache.
    blocks_n, blocks_m = gl.cdiv(TILES, T), gl.cdiv(M, BLOCK_M)
    group = gl.program_id(0) // (blocks_n * GROUP)
    height = gl.minimum(blocks_m - group * GROUP, GROUP)
    within = gl.program_id(0) % (blocks_n * GROUP)
    block_n, block_m = within // height, group * GROUP + within % height
    first = block_n * T
    second = first + T // 2
    matrix = gl.to_tensor(0).to(gl.int64)
    out = (row_scale, bias, M, N)
    if EARLY:
        # The kernel before this one may still run, and may write the activations. It may have written the weights, too.
        for step in range(gl.minimum(EARLY // C, STEPS)):
            fetch(codes, scales, matrix, first, second, TILES, CHUNKS, step, T, C, ELEMENT, SCALE)
        gdc_wait()
        gdc_launch_dependents()
    if BULK:
        accs = hopper_bulk.product(
            (x, x_rest), block_m * BLOCK_M, codes, scales, ratios, matrix, first, second, TILES, STEPS, CHUNKS,
            ELEMENT, SCALE, BLOCK_M, T, C, STAGES, ODD, BULK,
        )  # fmt: skip
        _store(y, accs[0], first, second, block_m * BLOCK_M, *out, ROW_SCALE, HAS_BIAS, main_of(BLOCK_M), T)
        if rest_of(BLOCK_M):
            rest = block_m * BLOCK_M + main_of(BLOCK_M)
            _store(y, accs[1], first, second, rest, *out, ROW_SCALE, HAS_BIAS, rest_of(BLOCK_M), T)
    else:
        held = buffers(T, C, STAGES, ELEMENT, SCALE)
        at = pointers(codes, scales, matrix, first, second, TILES, CHUNKS, T, C, ELEMENT, SCALE)
        for s in gl.static_range(STAGES - 1):
            copy_weights(held, at, s, s, STEPS, CHUNKS, T, C, ELEMENT, SCALE, EVEN)
        TOKENS: gl.constexpr = gl.BlockedLayout([1, 8], [4 // C, 8 * C], [WARPS, 1], [1, 0])
        m = block_m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TOKENS))
        rows = (m % M).to(gl.int64)
        real = None
        if not ALL:
            real = m < M
        acc = product(
            x, rows, real, held, at, ratios, matrix, first, second,
            TILES, STEPS, CHUNKS, K, ELEMENT, SCALE, EVEN, BLOCK_M, T, C, STAGES, OVERLAP, ODD, PARTS,
        )  # fmt: skip
        _store(y, acc, first, second, block_m * BLOCK_M, *out, ROW_SCALE, HAS_BIAS, BLOCK_M, T)


def linear(x: Tensor, w: Fragments, bias: Tensor | None, cut: Cut | None = None) -> Tensor:
    """[M, K] in bfloat16, float16 or float32 -> [M, N] in x's dtype; M and N at least 1."""
    m, (n, k) = x.shape[0], w.shape
    parts = PARTS[x.dtype]
    cut = cut or cuts.linear_cut(w.format, m, w.tiles, parts)
    if cut.wide:
        if not hopper_wide.refuse(w, None, (bias,)):
            with tiles.on(x.device):
                return hopper_linear.linear(as_parts(x), w, bias, cut)
        cut = cut.usual(tail=False)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    tokens, _, rest = read_as(x, cut)
    with tiles.on(x.device):
        _linear_kernel[(-(-w.tiles // cut.tiles) * -(-m // cut.block_m),)](
            y, tokens, rest, w.codes, w.scales, w.ratios, w.row_scale, bias, m, n, k, *cut.sizes(w),
            HAS_BIAS=bias is not None, GROUP=8, PARTS=parts, ALL=m > _ASKED, EARLY=EARLY, **cut.constants(w),
            **tiles.launch(EARLY > 0),
        )  # fmt: skip
    return y


def read_as(x: Tensor, cut: Cut) -> tuple[Tensor | TensorDescriptor, ...]:
    """How a cut's kernels read x [M, K]: its main blocks, those of a tail, and the rest of each block, see `cuts`.

    Descriptors for bulk copies of so many tokens, or three times bfloat16 [M, PARTS, K].
    """
    parts = as_parts(x)
    if not cut.bulk:
        return parts, parts, parts
    main, rest = split(cut.block_m)
    tail = tail_of(cut.block_m) if cut.tail else main
    found = []
    # A tail is copied as a program of its own size copies, which may be two steps at once where the whole is not.
    for tokens, copied in (
        (main, cut.copied),
        (tail, replace(cut, block_m=tail).copied),
        (rest or main, cut.copied),
    ):
        block = [tokens, 64 * copied]
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        found.append(TensorDescriptor.from_tensor(parts.view(-1, parts.shape[-1]), block, layout))
    return tuple(found)


def as_parts(x: Tensor) -> Tensor:
    """[M, K] -> bfloat16 [M, PARTS, K] that add up to x exactly, so placed that 16 bytes can be copied at a time.

    Cut off, not rounded: rounding up could overflow. What leaves bfloat16's range below 2^-133 is lost; infinities
    and NaNs are in the first part alone.
    """
    if x.dtype == torch.bfloat16:
        x = x.contiguous()
        return x if x.data_ptr() % 16 == 0 else x.clone()
    rest, parts = x.float(), []
    for _ in range(PARTS[x.dtype]):
        high = (rest.view(torch.int32) & -65536).view(torch.float32)
        high = torch.where(rest.isnan(), rest, high)
        parts.append(high.bfloat16())
        rest = torch.where(high.isfinite(), rest - high, 0.0)
    return torch.stack(parts, 1)
