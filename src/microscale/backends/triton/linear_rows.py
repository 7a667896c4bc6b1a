"""Which cut a linear of many tokens takes on Hopper: the one whose programs, on the busiest multiprocessor, take least.

Equal programs leave some multiprocessors idle in the last round. What full ones leave of the tokens may be another
kind's, which run there: fewer tokens, and twice the tiles of weights, so that they are few.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

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
        bits: of the codes that it is for; 0: of all that its group has.
    """

    tokens: float
    tiles: int
    cuts: tuple[Cut, ...]
    steps: tuple[float, ...] = (1.0,)
    rests: tuple[tuple[int, int, float], ...] = ()
    bits: int = 0

    def holds(self, tokens: float, tiles: int, bits: int) -> bool:
        return tokens <= self.tokens and tiles >= self.tiles and self.bits in (0, bits)

    def fit(self, tokens: int, tiles: int) -> Cut:
        """The cut whose steps, one after the other on the busiest multiprocessor, take least."""
        step = dict(zip(self.cuts, self.steps, strict=True))
        found = {cut: rounds(programs(cut, tokens, tiles).full) * step[cut] for cut in step}
        for cut, (rest, of, other) in product(step, self.rests):
            if of == cut.rest_tiles and 0 < tokens % cut.block_m <= rest and cut.block_m <= tokens:
                both = replace(cut, rest=rest)
                found[both] = busiest(programs(both, tokens, tiles), step[cut], other)
        return min(found, key=found.__getitem__)

    def mixed(self) -> list[Cut]:
        """Of each kind of programs for what others leave one cut that has it: the narrowest."""
        found = []
        for rest, of, _ in self.rests:
            fit = [cut for cut in self.cuts if cut.rest_tiles == of and cut.block_m >= rest]
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


class Programs(NamedTuple):
    """Of a linear: tokens of full programs, how many of these there are, and of those for what they leave."""

    tokens: int
    full: int
    rest: int


def programs(cut: Cut, tokens: int, tiles: int) -> Programs:
    """Of a cut, for so many tokens and tiles of 64 rows. Without `rest` the last full ones may be partly empty."""
    in_full = tokens // cut.block_m * cut.block_m if cut.rest else tokens
    full = -(-tiles // cut.tiles) * -(-in_full // cut.block_m)
    rest = -(-tiles // cut.rest_tiles) * -(-(tokens - in_full) // cut.rest) if cut.rest else 0
    return Programs(in_full, full, rest)


def rounds(count: int) -> int:
    """How many of so many programs the busiest multiprocessor has one after the other."""
    return -(-count // MULTIPROCESSORS)


def busiest(found: Programs, full: float, rest: float) -> float:
    """What the busiest multiprocessor's take, where those for the rest run on those that have a full one less."""
    over = found.full % MULTIPROCESSORS
    fewer = found.full // MULTIPROCESSORS * full + -(-found.rest // (MULTIPROCESSORS - over)) * rest
    return max(rounds(found.full) * full, fewer)
