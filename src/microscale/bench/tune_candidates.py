"""What the tuner may try for a row of `cuts.json`, whether its numbers are right, and how long it takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import inf
from typing import TypeVar

import torch
import triton
from torch import Tensor

from microscale.activations import GPT_OSS
from microscale.backends import triton as backend
from microscale.backends.triton import cuts, hopper, hopper_experts, nvrtc
from microscale.backends.triton.cuts import Cut
from microscale.backends.triton.fragments import Fragments
from microscale.bench import gpu
from microscale.formats import Format
from microscale.quant import quantize
from microscale.tolerance import linear_budget, moe_budget

Key = TypeVar("Key")

# tiles, chunks, warps, stages, bulk, and programs; each with and without overlap where there is a choice.
_SHAPES = {
    8: (
        (1, 4, 4, 4, 0, 0),
        (1, 4, 4, 6, 0, 0),
        (1, 2, 4, 8, 0, 0),
        (2, 2, 4, 4, 0, 0),
        (2, 2, 4, 3, 0, 0),
        (2, 4, 4, 3, 0, 0),
        (4, 1, 4, 4, 0, 0),
    ),
    16: ((1, 4, 4, 4, 0, 0), (2, 2, 4, 4, 0, 0), (2, 2, 4, 3, 0, 0), (2, 1, 4, 6, 0, 0), (4, 1, 4, 4, 0, 0)),
    32: ((1, 4, 4, 4, 0, 0), (1, 2, 4, 6, 0, 0), (2, 1, 4, 6, 0, 0), (2, 1, 4, 5, 0, 0), (2, 2, 4, 3, 0, 0)),
    40: ((2, 1, 4, 3, 4, 0),),
    64: ((1, 4, 4, 4, 4, 0), (1, 2, 4, 4, 4, 0), (1, 2, 4, 5, 0, 0), (2, 1, 4, 6, 0, 0), (2, 1, 4, 5, 0, 0)),
    80: ((2, 1, 4, 3, 4, 0),),
    128: (
        (1, 4, 4, 3, 4, 0),
        (1, 2, 4, 4, 4, 0),
        (1, 2, 4, 3, 4, 0),
        (2, 1, 8, 3, 1, 2),
        (2, 1, 8, 3, 4, 2),
        (2, 1, 4, 3, 4, 0),
    ),
    192: ((2, 1, 8, 3, 4, 0), (2, 1, 8, 4, 4, 0)),
    256: ((2, 1, 8, 4, 1, 0), (2, 1, 8, 4, 4, 0)),
}

# By `hopper_wide` and `hopper_linear`, from so many tokens a matrix on.
_WIDE = (
    "m48t4c1w12s12x",
    "m64t4c1w12s10x",
    "m112t4c1w12s9x",
    "m128t4c1w12s8x",
    "m144t3c1w16s8x",
    "m144t4c1w12s8x",
    "m256t2c1w12s5x",
)
_WIDE_FROM = 28

# By `hopper_wide` alone, with more tiles; three a group have registers only where codes have 4 bits.
_MANY_TILES = (
    "m24t9c1w16s8x",
    "m32t6c1w16s8x",
    "m32t9c1w16s8x",
    "m40t9c1w16s8x",
    "m48t6c1w16s8x",
    "m48t9c1w16s8x",
    "m64t6c1w16s10x",
    "m80t6c1w16s8x",
)
_MANY_TILES_FROM = 11


def wide_candidates(fmt: Format, tokens: float, experts: bool = False) -> list[Cut]:
    """Cuts in CUDA C++ for about `tokens` tokens a matrix, where they can be compiled; with as many stages as fit."""
    if nvrtc.refuse() is not None:
        return []
    words = [*_WIDE] if tokens >= _WIDE_FROM else []
    if experts and tokens >= _MANY_TILES_FROM:
        words += _MANY_TILES
    found = [Cut.parse(word).fitted(fmt, 1) for word in words]
    room = [cut for cut in found if cut.tiles <= 2 * cut.users or fmt.element.bits == 4]
    return [cut for cut in room if cut.block_m >= min(tokens, 256) / 2]


def candidates(fmt: Format, tokens: float, tail: bool) -> list[Cut]:
    """Cuts for up to `tokens` tokens a matrix: blocks of half as many to half as many again."""
    tokens = min(tokens, max(_SHAPES))
    sizes = [m for m in _SHAPES if tokens / 2 <= m <= max(tokens * 1.5, 8)]
    found = []
    for m in sizes:
        for (t, c, w, s, bulk, programs), overlap in itertools.product(_SHAPES[m], (False, True)):
            cut = Cut(m, t, c, w, s, overlap, tail and m >= 16, bulk, programs)
            if (overlap or not bulk) and cut.shared(fmt, 1) <= cuts.HOPPER_SHARED:
                found.append(cut)
    return found


class Checked:
    """Small problems of a format: whether a cut gives their float64 result, and the same bits as the first cut."""

    def __init__(self, fmt: Format) -> None:
        self.w = quantize(torch.randn(520, 1376, device="cuda"), fmt.name)
        self.x = torch.randn(300, 1376, device="cuda").bfloat16()
        self.w13 = quantize(torch.randn(8, 704, 416, device="cuda") / 20, fmt.name)
        self.w2 = quantize(torch.randn(8, 416, 352, device="cuda") / 20, fmt.name)
        self.tokens = torch.randn(300, 416, device="cuda").bfloat16()
        # `hopper_rings` takes few routes, and columns in steps of 64.
        self.few13 = quantize(torch.randn(8, 1152, 768, device="cuda") / 20, fmt.name)
        self.few2 = quantize(torch.randn(8, 768, 576, device="cuda") / 20, fmt.name)
        self.ids, self.weights = gpu.random_routes(300, 8, 4)
        self.linear_bits: Tensor | None = None
        self.moe_bits: Tensor | None = None
        self.said: dict[tuple[str, Cut], bool] = {}

    def linear(self, cut: Cut) -> bool:
        """Of a linear."""
        if ("linear", cut) not in self.said:
            w = backend.pack(self.w)
            assert isinstance(w, Fragments)
            y = hopper.linear(self.x, w, None, cut)
            self.linear_bits = y if self.linear_bits is None else self.linear_bits
            same = torch.equal(y, self.linear_bits)
            same &= torch.equal(hopper.linear(self.x[7:8], w, None, cut), y[7:8])
            self.said["linear", cut] = same and linear_budget(self.x, self.w).worst(y) <= 1
        return self.said["linear", cut]

    def moe(self, cut: Cut) -> bool:
        """Of experts, both kernels."""
        if cut.rings and ("moe", cut) not in self.said:
            self.said["moe", cut] = self._few(cut)
        if ("moe", cut) not in self.said:
            w13, w2 = backend.pack(self.w13), backend.pack(self.w2)
            assert isinstance(w13, Fragments)
            assert isinstance(w2, Fragments)

            def run(rows: slice) -> Tensor:
                given = (self.tokens[rows], self.ids[rows], self.weights[rows])
                return hopper_experts.moe(*given, w13, w2, GPT_OSS, None, None, None, False, (cut, cut))

            y = run(slice(None))
            self.moe_bits = y if self.moe_bits is None else self.moe_bits
            same = torch.equal(y, self.moe_bits)
            same &= torch.equal(run(slice(7, 30)), y[7:30])
            if cut.block_m == 8:  # a single token's kernel is another one: it finds experts without a list
                same &= torch.equal(run(slice(7, 8)), y[7:8])
            budget = moe_budget(self.tokens, self.ids, self.weights, self.w13, self.w2, GPT_OSS)
            self.said["moe", cut] = same and budget.worst(y) <= 1
        return self.said["moe", cut]

    def _few(self, cut: Cut) -> bool:
        """Of experts of few tokens."""
        x = torch.randn(32, 768, device="cuda").bfloat16()
        w13, w2 = backend.pack(self.few13), backend.pack(self.few2)
        assert isinstance(w13, Fragments)
        assert isinstance(w2, Fragments)

        def run(rows: slice, pair: tuple[Cut, Cut]) -> Tensor:
            given = (x[rows], self.ids[rows], self.weights[rows])
            return hopper_experts.moe(*given, w13, w2, GPT_OSS, None, None, None, False, pair)

        usual = Cut.parse("m8t2c2w4s3")
        y = run(slice(32), (cut, cut))
        same = torch.equal(y, run(slice(32), (usual, usual)))
        same &= torch.equal(run(slice(7, 16), (cut, cut)), y[7:16])
        budget = moe_budget(x, self.ids[:32], self.weights[:32], self.few13, self.few2, GPT_OSS)
        return same and budget.worst(y) <= 1


def timed(calls: list[Callable[[], object]]) -> float:
    """Infinity for what does not compile."""
    try:
        return gpu.microseconds(calls, 25)
    except (triton.errors.TritonError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        return inf


def least_loss(times: dict[Key, dict[str, float]]) -> Key:
    """What loses least against the fastest of each cell, in the mean of logarithms."""
    cells = {cell for found in times.values() for cell in found}
    least = {cell: min(found[cell] for found in times.values()) for cell in cells}

    def loss(key: Key) -> float:
        product = 1.0
        for cell in cells:
            product *= times[key][cell] / least[cell]
        return product

    return min(times, key=loss)
