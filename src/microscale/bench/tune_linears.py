"""Finds the cuts of Hopper's linears again.

A row is timed with what lies in its upper half, all matrices of `gpu.LINEARS`. Of a row of several cuts the sizes
decide which is taken, by what a step of each takes: these stay, checked and timed anew, in many sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from math import inf
from statistics import median
from typing import Any

import torch

from microscale.backends.triton import cuts, hopper
from microscale.backends.triton.cuts import Cut
from microscale.backends.triton.linear_rows import MULTIPROCESSORS, LinearRow, programs, rounds
from microscale.bench import gpu
from microscale.bench.tune_candidates import Checked, candidates, least_loss, timed, wide_candidates
from microscale.errors import MicroscaleError
from microscale.formats import FORMATS, Format

# For rows of several cuts: matrices, tokens of which one is in the row, and how near to the best a time counts.
_SIZES = gpu.LINEARS | {
    "2048x4096": (2048, 4096),
    "2880x4096": (2880, 4096),
    "4096x4096": (4096, 4096),
    "14336x4096": (14336, 4096),
}
_BETWEEN = (48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048)
_NEAR = 1.25


def format_of(row: LinearRow, fmt: Format) -> Format:
    """What a row is timed with: the format that stands for its group, or one of the bits that it is for."""
    if row.bits in (0, fmt.element.bits):
        return fmt
    group = cuts.group(fmt)
    return next(f for f in FORMATS.values() if cuts.group(f) == group and f.element.bits == row.bits)


def timed_with(rows: tuple[LinearRow, ...], row: LinearRow, fmt: Format) -> tuple[int, list[str]]:
    """Tokens, and matrices for which these rows take this one with a format: of `gpu.LINEARS`, or of all sizes.

    Raises:
        MicroscaleError: there are none.
    """
    m = int(min(row.tokens, 2048))
    while m <= 1 << 14:
        for sizes in (gpu.LINEARS, _SIZES):
            found = [
                name
                for name, (n, _) in sizes.items()
                if next(r for r in rows if r.holds(m, n // 64, fmt.element.bits)) is row
            ]
            if found:
                return m, found
        m *= 2
    raise MicroscaleError(f"no matrix of {list(_SIZES)} takes the row of up to {row.tokens} tokens")


def entry_of(row: LinearRow) -> dict[str, Any]:
    """As `cuts.json` has a row, but for the times."""
    entry: dict[str, Any] = {"tokens": None if row.tokens == inf else row.tokens}
    if row.tiles:
        entry["tiles"] = row.tiles
    if row.bits:
        entry["bits"] = row.bits
    if len(row.cuts) == 1:
        return entry | {"cut": str(row.cuts[0])}
    entry["steps"] = dict(zip(map(str, row.cuts), row.steps, strict=True))
    rests = {f"m{tokens}t{tiles}": step for tokens, tiles, step in row.rests}
    return entry | {"rests": rests} if rests else entry


def steps_of(row: LinearRow, times: dict[tuple[int, int, int], dict[Cut, float]]) -> tuple[float, ...]:
    """Of each cut: the median of what a step took where it was not far behind the best, or wherever it was timed.

    Args:
        times: of M, N and K what each cut took, in microseconds.
    """
    found = []
    for cut in row.cuts:
        steps = []
        for (m, n, k), of in times.items():
            step = 1e3 * of[cut] / (rounds(programs(cut, m, -(-n // 64)).full) * -(-k // 64))
            steps.append((of[cut] > _NEAR * min(of.values()), step))
        far = all(is_far for is_far, _ in steps)
        found.append(float(round(median(step for is_far, step in steps if is_far == far))))
    return tuple(found)


def _several(row: LinearRow, rows: tuple[LinearRow, ...], fmt: Format, checked: Checked) -> dict[str, Any]:
    """A row of several cuts, as `cuts.json` has it.

    Raises:
        MicroscaleError: a cut's numbers are wrong, or it does not compile.
    """
    times: dict[tuple[int, int, int], dict[Cut, float]] = {}
    weights = cache(partial(_weights, fmt))
    for n, k in _SIZES.values():
        for m in _BETWEEN:
            if next(r for r in rows if r.holds(m, n // 64, fmt.element.bits)) is row:
                times[m, n, k] = {cut: _timed(weights(n, k), m, cut) for cut in row.cuts}
    wrong = [str(c) for c in row.cuts if max(of[c] for of in times.values()) == inf or not checked.linear(c)]
    if wrong:
        raise MicroscaleError(f"wrong numbers, or none, with the cuts {', '.join(wrong)} of cuts.json")
    new = replace(row, steps=steps_of(row, times), rests=_rests(row, fmt, weights, checked))
    us = {}
    for what, (n, k) in gpu.LINEARS.items():
        for m in _BETWEEN:
            if of := times.get((m, n, k)):
                cut = new.fit(m, n // 64)
                us[f"{what} M={m}"] = round(of[cut] if cut in of else _timed(weights(n, k), m, cut), 1)
    return entry_of(new) | {"us": us}


def _rests(
    row: LinearRow, fmt: Format, weights: Callable[[int, int], list[Any]], checked: Checked
) -> tuple[tuple[int, int, float], ...]:
    """These kinds of programs and what a step of each takes now.

    Args:
        weights: as `_weights`, of N and K.

    Raises:
        MicroscaleError: numbers are wrong, or it does not compile.
    """
    found = []
    k = 4096
    for tokens, tiles, _ in row.rests:
        # The widest, so that these tokens are too few for its usual programs.
        widest = max((cut for cut in row.cuts if cut.rest_tiles == tiles), key=lambda cut: cut.block_m)
        cut = replace(widest, rest=tokens).fitted(fmt, 1)
        us = _timed(weights(MULTIPROCESSORS // 3 * tiles * 64, k), tokens, cut)
        if us == inf or not checked.linear(cut):
            raise MicroscaleError(
                f"wrong numbers, or none, with the cut {cut}: m{tokens}t{tiles} of cuts.json"
            )
        found.append((tokens, tiles, float(round(1e3 * us / (k // 64)))))
    return tuple(found)


def _weights(fmt: Format, n: int, k: int) -> list[Any]:
    """For sixteen calls, of so many matrices that none is in the cache."""
    return ([gpu.random_weights(fmt.name, n, k) for _ in range(max(2, int(1.6e8 / (n * k))))] * 16)[:16]


def _timed(weights: list[Any], m: int, cut: Cut) -> float:
    x = torch.randn(m, weights[0].shape[-1], device="cuda").bfloat16()
    return timed([partial(hopper.linear, x, w, None, cut) for w in weights])


def tune_linear(name: str, fmt: Format, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The rows of linears, as `cuts.json` has them, by a format that stands for the group `name`."""

    @cache
    def weights(of: Format, what: str) -> list[Any]:
        n, k = _SIZES[what]
        return [gpu.random_weights(of.name, n, k) for _ in range(max(4, int(3.5e8 / (n * k))))]

    checked = cache(Checked)
    rows = cuts.table()[name][0]
    for row in rows:
        if len(row.cuts) > 1:
            yield _several(row, rows, fmt, checked(fmt))
            say(f"{name}, linear, to {row.tokens} tokens: {len(row.cuts)} cuts, of which the sizes choose")
            continue
        of = format_of(row, fmt)
        m, of_row = timed_with(rows, row, of)
        times: dict[Cut, dict[str, float]] = {}
        for cut in dict.fromkeys([*row.cuts, *candidates(of, m, tail=False), *wide_candidates(of, m)]):
            found = {}
            for what in of_row:
                x = torch.randn(m, _SIZES[what][1], device="cuda").bfloat16()
                used = weights(of, what) if m <= 128 else weights(of, what)[:4]
                found[f"{what} M={m}"] = timed([partial(hopper.linear, x, w, None, cut) for w in used])
            if max(found.values()) < inf and checked(of).linear(cut):
                times[cut] = found
        best = least_loss(times)
        say(f"{name}, linear, to {row.tokens} tokens: {best}, before {row.cuts[0]}")
        yield entry_of(row) | {"cut": str(best), "us": {k: round(v, 1) for k, v in times[best].items()}}
