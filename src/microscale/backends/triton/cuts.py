"""How Hopper's kernels cut a product into programs and steps, and which cut for what: `cuts.json`, measured.

`microscale bench tune` writes the file. Only cuts whose numbers were checked on the GPU that timed them are in it. Of
many tokens a row has several, and the sizes decide: see `linear_rows` and `MoeRow.fit`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import resources
from math import inf
from statistics import NormalDist, fmean
from typing import Any

from microscale.backends.triton.fragments import Fragments
from microscale.backends.triton.linear_rows import LinearRow, rests_of
from microscale.formats import Format

HOPPER_SHARED = 227 << 10  # bytes that a program may use,
STATIC_SHARED = 48 << 10  # and of these what its text may have room for by itself
REGISTERS = 1 << 16  # of a multiprocessor
_SAMPLES = 20  # of how many routes an expert has
_WORD = re.compile(r"m(\d+)t(\d+)c(\d+)w(\d+)s(\d+)(o?)(h?)(f?)(?:b(\d+))?(?:p(\d))?(?:(x)(\d*))?(r?)")


def split(block_m: int) -> tuple[int, int]:
    """Tokens that the matrix unit takes in one instruction, and in a second one with the same weights, or 0."""
    main = 1 << block_m.bit_length() - 1
    return main, block_m - main


def wide_stages(stages: int, most: int, weights: int) -> int:
    """With `wide`: bytes of so many stages, each with `most` tokens, copied 16 at a time, and so many bytes of weights,
    from a multiple of 1024 on; and room to find one."""
    return 1024 * (stages * -(-(-(-most // 16) * 2048 + weights) // 1024) + 1)


def tail_of(block_m: int) -> int:
    """The smaller number of tokens of a cut with `tail`."""
    main, rest = split(block_m)
    return main if rest else main // 2


@dataclass(frozen=True)
class Cut:
    """How Hopper's kernels cut a product into programs and steps. Decides the speed only: no sum depends on it.

    Attributes:
        block_m: tokens of a program, 8 to 384: a power of two or, with `bulk`, the sum of two, see `split`.
        tiles: of 64 rows in a program.
        chunks: of 64 columns in a step; 1 for activations of several parts, whose sums take turns by the step.
        warps: 4, or 8 and at least two tiles.
        stages: steps whose weights and tokens are in shared memory, with `bulk` copies of tokens; at least 3.
        overlap: decode the next step while the matrix unit works.
        tail: experts' last tiles that fit into `tail_of` tokens take the time of so many; block_m at least 16.
        bulk: other than 0: by `hopper_bulk`; from 2 on, codes are asked for so many steps before they are multiplied.
            One part only, and with `overlap`.
        programs: other than 0: the compiler is held to the registers with which so many fit a multiprocessor; with
            `few` no more fit, so that early programs do not crowd where the kernel ahead has left room.
        few: of experts, by `hopper_few`, whose stages are steps with codes in registers. Activations of one part only.
        wide: by `hopper_wide`, in which a group of four warps copies and `users` multiply, each one or two of `tiles`;
            block_m is the most tokens of a program, whose number is fitted to an expert's; a linear's all have so many.
            Activations of one part only.
        rest: other than 0: of a linear with `wide`, what full programs leave of the tokens goes to others of so many,
            which have twice the tiles.
        rings: of experts, both by `hopper_rings`: `warps` multiply, each four of them one to three of `tiles`, up to 32
            tokens; chunks are of a stage, at most. Activations of one part only.
    """

    block_m: int
    tiles: int
    chunks: int
    warps: int
    stages: int
    overlap: bool = False
    tail: bool = False
    bulk: int = 0
    programs: int = 0
    few: bool = False
    wide: bool = False
    rest: int = 0
    rings: bool = False

    def __str__(self) -> str:
        flags = (
            ("o" if self.overlap else "")
            + ("h" if self.tail else "")
            + ("f" if self.few else "")
            + (f"b{self.bulk}" if self.bulk else "")
            + (f"p{self.programs}" if self.programs else "")
            + ("x" if self.wide else "")
            + (f"{self.rest}" if self.rest else "")
            + ("r" if self.rings else "")
        )
        return f"m{self.block_m}t{self.tiles}c{self.chunks}w{self.warps}s{self.stages}{flags}"

    @staticmethod
    def parse(word: str) -> Cut:
        """The inverse of str."""
        found = _WORD.fullmatch(word)
        if found is None:
            raise ValueError(f"{word!r} names no cut, as m128t2c1w8s5ohb1 does")
        m, t, c, w, s, overlap, tail, few, bulk, programs, wide, rest, rings = found.groups()
        sizes = (int(m), int(t), int(c), int(w), int(s))
        asked = (int(bulk or 0), int(programs or 0))
        return Cut(
            *sizes, overlap == "o", tail == "h", *asked, few == "f", wide == "x", int(rest or 0), rings == "r"
        )

    def constants(self, w: Fragments) -> dict[str, Any]:
        """Compile-time arguments of the kernels."""
        steps = self.sizes(w)[2]
        return {
            "ELEMENT": w.format.element.name,
            "SCALE": w.format.scale,
            "EVEN": w.shape[-1] % (64 * self.chunks) == 0,
            "BLOCK_M": self.block_m,
            "T": self.tiles,
            "C": self.chunks,
            "STAGES": self.stages,
            "OVERLAP": self.overlap,
            "BULK": self.bulk,
            "ODD": steps % 2 == 1,
            "ROW_SCALE": w.row_scale is not None,
            "num_warps": self.warps,
        } | (
            {"maxnreg": min(REGISTERS // (32 * self.warps * self.programs) & -8, 255)}
            if self.programs
            else {}
        )

    @property
    def copied(self) -> int:
        """Chunks in a bulk copy of tokens: a step's, or of one chunk two steps', so that warps wait half as often for
        each other. Of 256 tokens that would leave room for too few copies."""
        return 2 if self.chunks == 1 and self.block_m < 256 else self.chunks

    def room(self, columns: int) -> int:
        """With `few`: for how many times 256 columns of tokens there is shared memory; a multiple of what a copy has,
        see `hopper_few`."""
        quads = max(-(-columns // 256), 1)
        least = HOPPER_SHARED // (self.programs + 1) // (512 * self.block_m) + 1 if self.programs else 0
        return -(-max(quads, least) // (quads & -quads)) * (quads & -quads)

    @property
    def users(self) -> int:
        """With `wide`: groups of warps that multiply."""
        return self.warps // 4 - 1

    @property
    def rest_tiles(self) -> int:
        """Of programs with `rest` tokens."""
        return 2 * self.tiles

    def usual(self, tail: bool) -> Cut:
        """With `wide`: Gluon's kernels for as many tokens, where there is no compiler for CUDA C++.

        Args:
            tail: of experts.
        """
        main, rest = split(self.block_m)
        if tail and self.block_m <= 32:
            return Cut(32, 2, 2, 4, 3, tail=True)
        if tail and main >= 64 and main == 4 * rest:  # in two parts that meet the same weights
            return Cut(self.block_m, 2, 1, 4, 3, overlap=True, tail=True, bulk=4)
        m = 64 if self.block_m <= 64 else main << (2 * rest >= main) if tail else 128
        if m <= 64:
            return Cut(m, 2, 1, 4, 6, overlap=True, tail=tail)
        return Cut(m, 2, 1, 8, 3, overlap=True, tail=tail, bulk=1, programs=2 if m == 128 else 0)

    def spread(self, programs: int, units: int) -> Cut:
        """For so many programs on so many multiprocessors: with `few`, where they need more, nothing keeps any away."""
        return replace(self, programs=0) if self.few and programs > self.programs * units else self

    def sizes(self, w: Fragments) -> tuple[int, int, int]:
        """Of the matrix: tiles, chunks, and the steps that these are cut into."""
        return w.tiles, w.chunks, -(-w.chunks // self.chunks)

    def shared(self, fmt: Format, parts: int, columns: int = 0) -> int:
        """Bytes of shared memory that the loop takes, for weights of a format and activations of `parts` parts.

        Args:
            columns: K, all of which is there with `few`.
        """
        scales = 256 if fmt.scale == "e4m3" else 128
        if self.wide:  # and barriers, and of every group experts' routes and shares
            besides = 16 * (4 * self.stages + 6 + self.users * self.block_m)
            tile = 512 * fmt.element.bits + scales
            kinds = ((self.block_m, self.tiles), (self.rest, self.rest_tiles if self.rest else 0))
            return max(wide_stages(self.stages, tokens, tiles * tile) for tokens, tiles in kinds) + besides
        if self.few:
            return 512 * self.block_m * self.room(columns)
        if self.rings:  # and tokens, see `hopper_rings.Rings`
            return self.stages * self.chunks * self.tiles * (512 * fmt.element.bits + scales)
        if self.bulk:  # codes go straight to registers
            return self.stages * (self.copied * 128 * self.block_m + 8)
        return (
            self.stages
            * self.chunks
            * (self.tiles * (512 * fmt.element.bits + scales) + 128 * parts * self.block_m)
        )

    def of_experts(self, w: Fragments, apart: bool = False) -> Cut:
        """For these matrices: another one where `few` has no way to take them.

        Args:
            apart: gates and ups lie apart, so a program needs a tile of each.
        """
        if self.wide:
            return self._in_pairs().fitted(w.format, 1) if apart else self
        if self.few and (w.format.scale == "f32" or self.shared(w.format, 1, w.shape[-1]) > HOPPER_SHARED):
            usual = replace(self, tiles=2, chunks=2, warps=4, stages=4, programs=0, few=False)
            return usual.fitted(w.format, 1)
        if apart and self.tiles == 1:
            return replace(self, tiles=2, warps=8, programs=0)
        return self

    def _in_pairs(self) -> Cut:
        """With `wide`, for gates and ups that lie apart: each group of warps has a tile of both."""
        if self.tiles == 2 * self.users:
            return self
        if self.tiles < 3 * self.users:
            return replace(self, tiles=4, warps=12)
        # Where registers allow it, a fourth group makes up for the third tile.
        return replace(self, tiles=8, warps=20) if self.block_m <= 40 else replace(self, tiles=6, warps=16)

    def fitted(self, fmt: Format, parts: int) -> Cut:
        """For a format that it was not measured with: what fits."""
        cut = self
        while cut.shared(fmt, parts) > HOPPER_SHARED and cut.stages > 3:
            cut = replace(cut, stages=cut.stages - 1)
        return cut


@dataclass(frozen=True)
class MoeRow:
    """Attributes: routes up to which it holds, in all and for each expert hit, and columns of w2; pairs of cuts, of w13
    and w2."""

    routes: float
    each: float
    columns: float
    pairs: tuple[tuple[Cut, Cut], ...]

    def holds(self, tokens: int, routes: int, each: float, columns: int) -> bool:
        # A single token's experts may be chosen in its kernels, which `hopper_rings` cannot do.
        fit = routes <= self.routes and each <= self.each and columns <= self.columns
        return fit and (tokens > 1 or not self.rings)

    @property
    def rings(self) -> bool:
        return self.pairs[0][0].rings

    def fit(self, each: float) -> tuple[Cut, Cut]:
        """The pair whose programs have least to multiply for experts of about so many routes."""
        if len(self.pairs) == 1:
            return self.pairs[0]
        return min(self.pairs, key=lambda pair: mean_padded(pair[0], each))


def loops(most: int) -> tuple[int, ...]:
    """Tokens of `wide` experts' programs that there is a loop for, the greatest first; each takes time to compile."""
    return tuple(range(most, most // 2 - 1, -8))


def start(cut: Cut) -> float:
    """Tokens whose products take as long as decoding for a program does, and its beginning and end. The more tiles a
    program has, the less of that is a tile's."""
    return 40 + 96 / cut.tiles


def padded(cut: Cut, routes: int) -> float:
    """Tokens that the programs of an expert with so many routes multiply, and what each takes besides is worth."""
    full, rest = divmod(routes, cut.block_m)
    last = min((size for size in loops(cut.block_m) if size >= rest), default=0)
    return full * (cut.block_m + start(cut)) + (last + start(cut) if rest else 0)


def mean_padded(cut: Cut, each: float) -> float:
    """Of experts of about `each` routes, which routing spreads as a Poisson distribution does."""
    spread = NormalDist(each, each**0.5)
    counts = (max(round(spread.inv_cdf((i + 0.5) / _SAMPLES)), 1) for i in range(_SAMPLES))
    return fmean(padded(cut, count) for count in counts)


def group(fmt: Format) -> str:
    """Formats of a group take about as long, and share their rows."""
    return "block" if fmt.scale == "f32" else "4 bits" if fmt.element.bits == 4 else "6 or 8 bits"


@cache
def table(arch: str = "sm_90") -> dict[str, tuple[tuple[LinearRow, ...], tuple[MoeRow, ...]]]:
    """For each group of formats the rows of linears and of experts, the first that holds being the one."""
    text = (resources.files("microscale.backends.triton") / "cuts.json").read_text("utf-8")
    found = {}
    for name, rows in json.loads(text)["tables"][arch].items():
        linear = tuple(
            LinearRow(
                r["tokens"] or inf,
                r.get("tiles", 0),
                tuple(map(Cut.parse, steps)),
                tuple(steps.values()),
                rests_of(r.get("rests", {})),
                r.get("bits", 0),
            )
            for r in rows["linear"]
            for steps in [r["steps"] if "steps" in r else {r["cut"]: 1.0}]
        )
        moe = tuple(
            MoeRow(
                r["routes"] or inf,
                r["each"] or inf,
                r.get("columns", inf),
                tuple((Cut.parse(a), Cut.parse(b)) for a, b in r["pairs"]),
            )
            for r in rows["moe"]
        )
        found[name] = (linear, moe)
    return found


def linear_cut(fmt: Format, tokens: int, tiles: int, parts: int) -> Cut:
    """For `tokens` tokens and a matrix of `tiles` times 64 rows; `parts`: of the activations, see `hopper`."""
    cut = _in_parts(tokens) if parts > 1 else _linear_cut(group(fmt), fmt.element.bits, tokens, tiles)
    return cut.fitted(fmt, parts)


@lru_cache(4096)  # asked at every call of a linear
def _linear_cut(name: str, bits: int, tokens: int, tiles: int) -> Cut:
    return next(row for row in table()[name][0] if row.holds(tokens, tiles, bits)).fit(tokens, tiles)


def shares(tokens: int, top_k: int, experts: int) -> tuple[int, float]:
    """Routes in all, and for each expert that may be hit. A single token's are tiles of their own."""
    routes = tokens * top_k
    return routes, routes / min(experts, routes) if tokens > 1 else 1


def moe_cuts(
    fmts: tuple[Format, Format],
    tokens: int,
    top_k: int,
    experts: int,
    columns: int,
    parts: int,
    rings: bool = True,
) -> tuple[Cut, Cut]:
    """For w13 and w2, of these formats, w2 of so many columns; both have the same block_m and tail.

    Args:
        rings: cuts that `hopper_rings` may refuse are welcome, too.
    """
    routes, each = shares(tokens, top_k, experts)
    if parts > 1:
        cuts = (_in_parts(each),) * 2
    else:
        cuts = _moe_cuts(group(fmts[0]), tokens, routes, each, columns, rings)
    return cuts[0].fitted(fmts[0], parts), cuts[1].fitted(fmts[1], parts)


@lru_cache(4096)  # asked at every call of experts
def _moe_cuts(name: str, tokens: int, routes: int, each: float, columns: int, rings: bool) -> tuple[Cut, Cut]:
    """Of formats of two groups the first decides."""
    rows = (row for row in table()[name][1] if rings or not row.rings)
    return next(row for row in rows if row.holds(tokens, routes, each, columns)).fit(each)


def _in_parts(tokens: float) -> Cut:
    """Not measured: what shared memory takes three parts of."""
    return Cut(8 if tokens <= 8 else 16 if tokens <= 16 else 32 if tokens <= 32 else 64, 2, 1, 8, 4, True)
