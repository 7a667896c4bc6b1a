"""Where the bits of codes lie in the words that a thread of Hopper's kernels reads, for each element.

A group of 16 codes is eight pairs of neighbours along K, and a pair becomes two bfloat16 in one register: sign to bit
15, exponent and fraction to where bfloat16 keeps its own, which is the value times 2^(bias - 127). `LANDS` says on
which bit of a bfloat16 each bit of a code must land, `moves` what instructions make of the words: of each pair a word
or the exclusive or of two, each shifted or rotated, of which a mask leaves the pair's bits. A mask takes two words as
fast as one, so what one of them has there besides costs nothing: packing puts into the other what makes it right.

    4 bits  words 0 and 1: three pairs in place, 6 bits further down, and rotated by 10;
            pairs 6 and 7 from the joined word: 4 times word 1 plus word 0. Four bits of each half of both are free, and
            what is carried to them from below is known when packing comes to them
    6 bits  as if of 4 bits, the two others of each code from word 2; the joined word has bits of word 0 or of word 1,
            since with a sum all bits would depend on one another
    8 bits  a word for two pairs, one in place and the other of two shifts of the word

INT8 is kept plus 128, so without a sign: as the bits of a bfloat16 that is the number times 2^-133.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

# For bits 0, 1, ... of a code.
LANDS: dict[str, tuple[int, ...]] = {
    "e2m1": (6, 7, 8, 15),
    "e2m3": (4, 5, 6, 7, 8, 15),
    "e3m2": (5, 6, 7, 8, 9, 15),
    "e4m3": (4, 5, 6, 7, 8, 9, 10, 15),
    "e5m2": (5, 6, 7, 8, 9, 10, 11, 15),
    "int8": (0, 1, 2, 3, 4, 5, 6, 7),
}
CHOSEN = 0x0C180C18  # of 6 bits: what the joined word has of word 0; the rest is of word 1, 2 bits further up
# Of 4 bits, where four bits of the joined word begin that packing is free to choose: the first two by word 0, and the
# others by the same two bits of word 1.
FREE = (3, 10, 19, 26)
# Of 6 bits, how far to the left pairs 0 to 7 have word 2 rotated. Not every order can be packed.
_THIRD = {"e2m3": (4, 2, 0, -2, -4, -6, -8, -10), "e3m2": (4, -5, 2, 3, -6, 5, -4, -3)}
# Of 8 bits, the two shifts.
_SECOND = {"e4m3": (4, 24), "e5m2": (3, 24)}


class Shift(NamedTuple):
    """A word moved to the left.

    Attributes:
        word: of the group; one more than it has words: the joined one.
        left: 0 to 31.
        wraps: what leaves at the left comes in at the right.
    """

    word: int
    left: int
    wraps: bool

    def source(self, bit: int) -> int | None:
        """The word's bit that comes to `bit` of 0 to 31."""
        return None if not self.wraps and bit < self.left else (bit - self.left) % 32


def words(element: str) -> int:
    """Of a group of 16 codes."""
    return len(LANDS[element]) // 2


def sums(element: str) -> bool:
    """Whether the joined word is a sum."""
    return words(element) == 2


def _shifts(element: str, pair: int) -> tuple[Shift, ...]:
    count = words(element)
    if element == "int8":
        return (Shift(pair // 2, 24 * (pair % 2), True),)
    if count == 4:
        first, second = _SECOND[element]
        word = pair // 2
        return (Shift(word, first, False), Shift(word, second, True)) if pair % 2 else (Shift(word, 0, True),)
    if pair < 6:
        common = Shift(pair // 3, (0, 6, 10)[pair % 3], pair % 3 != 1)
    else:
        common = Shift(count, (2, 12)[pair - 6], pair == 7)
    if count == 2:
        return (common,)
    left = _THIRD[element][pair]
    return common, Shift(2, left % 32, left < 0)


@cache
def moves(element: str) -> tuple[tuple[tuple[Shift, ...], int], ...]:
    """For each pair: one or two words, and the mask of what is taken of their exclusive or."""
    mask = sum(0x10001 << bit for bit in LANDS[element])
    return tuple((_shifts(element, pair), mask) for pair in range(8))


def _stored(element: str, word: int, bit: int) -> tuple[int, int]:
    """(word, bit) where the joined word's is that of another."""
    if word < words(element) or sums(element):
        return word, bit
    return (0, bit) if CHOSEN >> bit & 1 else (1, bit - 2)


@cache
def taken(element: str) -> tuple[tuple[int, int, int, int, int], ...]:
    """(pair, half, word, mask, shift): of the word, shifted right by `shift`, these bits count for the code.

    A code is the exclusive or of all that counts for it. One more than there are words is a joined word that is a sum.
    """
    found: dict[tuple[int, int, int, int], int] = {}
    for pair, (shifts, _) in enumerate(moves(element)):
        for half in range(2):
            for i, bit in enumerate(LANDS[element]):
                for shift in shifts:
                    source = shift.source(bit + 16 * half)
                    if source is not None:
                        word, at = _stored(element, shift.word, source)
                        found[pair, half, word, at - i] = found.get((pair, half, word, at - i), 0) ^ 1 << i
    return tuple((p, h, w, mask, shift) for (p, h, w, shift), mask in found.items() if mask)


@cache
def changes(element: str) -> tuple[tuple[int, ...], ...]:
    """For each bit of each code, pair by pair and half by half: what it changes in the words, a joined sum among them.

    The inverse of `taken`.
    """
    bits = len(LANDS[element])
    # A code's bit -> the stored bits that it is of, as one number: 32 of each word.
    rows: dict[int, int] = {}
    for pair, half, word, mask, shift in taken(element):
        for i in range(bits):
            if mask >> i & 1:
                row = (2 * pair + half) * bits + i
                rows[row] = rows.get(row, 0) ^ 1 << 32 * word + i + shift
    # By a stored bit that has been solved for: it and those that have not, and the codes' bits which they all make.
    solved: dict[int, tuple[int, int]] = {}
    for row, stored in rows.items():
        codes = 1 << row
        for lead, (others, made) in solved.items():
            if stored >> lead & 1:
                stored, codes = stored ^ others, codes ^ made
        lead = stored.bit_length() - 1
        for other, (others, made) in solved.items():
            if others >> lead & 1:
                solved[other] = others ^ stored, made ^ codes
        solved[lead] = stored, codes
    found = [[0] * (words(element) + sums(element)) for _ in rows]
    for stored, (_, codes) in solved.items():
        for row in rows:
            found[row][stored // 32] |= (codes >> row & 1) << stored % 32
    return tuple(map(tuple, found))
