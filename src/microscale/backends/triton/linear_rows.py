"""Which cut a linear of many tokens takes on Hopper: the one whose programs, on the busiest multiprocessor, take least.

Equal programs leave some multiprocessors idle in the last round. What full ones leave of the tokens may be another
kind's, which run there: fewer tokens, and twice the tiles of weights, so that they are few.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from microscale.backends.triton.cuts import Cut

MULTIPROCESSORS = 132  # of an H100 or H200
_REST = re.compile(r"m(\d+)t(\d+)")


@dataclass(frozen=True)
class LinearRow:
    """Of `cuts.json`.

    Attributes:
        tokens: up to which it holds.
        tiles: of 64 rows from which it holds.
        cuts, steps: and what a step of each takes, in nanoseconds: of 64 columns, with all multiprocessors' programs at
            a time. A single cut needs none.
        rests: of programs for what others leave, their tokens and tiles, and what a step takes where every third
            multiprocessor has one. See `Cut.rest`.
    """

    tokens: float
    tiles: int
    cuts: tuple[Cut, ...]
    steps: tuple[float, ...] = (1.0,)
    rests: tuple[tuple[int, int, float], ...] = ()

    def holds(self, tokens: float, tiles: int) -> bool:
        return tokens <= self.tokens and tiles >= self.tiles

    def fit(self, tokens: int, tiles: int) -> Cut:
        """The cut whose steps, one after the other on the busiest multiprocessor, take least."""
        step = dict(zip(self.cuts, self.steps, strict=True))
        found = {cut: rounds(units(cut, tokens, tiles)[1][0]) * step[cut] for cut in step}
        for cut, (rest, of, other) in product(step, self.rests):
            if of == 2 * cut.tiles and 0 < tokens % cut.block_m <= rest and cut.block_m <= tokens:
                both = replace(cut, rest=rest)
                found[both] = busiest(units(both, tokens, tiles)[1], step[cut], other)
        return min(found, key=found.__getitem__)

    def mixed(self) -> list[Cut]:
        """Of each kind of programs for what others leave one cut that has it: the narrowest."""
        found = []
        for rest, of, _ in self.rests:
            fit = [cut for cut in self.cuts if 2 * cut.tiles == of and cut.block_m >= rest]
            found.append(replace(min(fit, key=lambda cut: cut.block_m), rest=rest))
        return found


def rests_of(steps: dict[str, float]) -> tuple[tuple[int, int, float], ...]:
    """`LinearRow.rests` as `cuts.json` has them, by words such as m64t2.

    Raises:
        ValueError: a word is none.
    """
    found = []
    for word, step in steps.items():
        kind = _REST.fullmatch(word)
        if kind is None:
            raise ValueError(f"{word!r} names no tokens and tiles, as m64t2 does")
        found.append((int(kind[1]), int(kind[2]), step))
    return tuple(found)


def rounds(programs: int) -> int:
    """How many of so many programs the busiest multiprocessor has one after the other."""
    return -(-programs // MULTIPROCESSORS)


def busiest(programs: tuple[int, int], usual: float, other: float) -> float:
    """What the busiest multiprocessor's take, where others run on those that have a usual one less."""
    over = programs[0] % MULTIPROCESSORS
    fewer = programs[0] // MULTIPROCESSORS * usual + -(-programs[1] // (MULTIPROCESSORS - over)) * other
    return max(rounds(programs[0]) * usual, fewer)


def units(cut: Cut, tokens: int, tiles: int) -> tuple[int, tuple[int, int]]:
    """Of a linear: tokens of usual programs, and how many of these there are and of those with `rest` tokens."""
    usual = tokens // cut.block_m * cut.block_m if cut.rest else tokens
    rest = -(-(tokens - usual) // cut.rest) * -(-tiles // (2 * cut.tiles)) if cut.rest else 0
    return usual, (-(-tiles // cut.tiles) * -(-usual // cut.block_m), rest)
