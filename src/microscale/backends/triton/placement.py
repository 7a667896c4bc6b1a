"""Where the bits of codes lie in the words that a thread of Hopper's kernels reads, for each element.

A group of 16 codes is eight pairs of neighbours along K, and a pair becomes two bfloat16 in one register: sign to bit
15, exponent and fraction to where bfloat16 keeps its own, which is the value times 2^(bias - 127). `LANDS` says on
which bit of a bfloat16 each bit of a code must land, `_source` from where: a word of the group, rotated left.
What lands in place, or by one rotation, costs least, so most of a code's bits lie that way:

    4 bits  words 0 and 1: three pairs in place, 6 bits further down, and rotated by 10;
            pairs 6 and 7: the four free bits of each half of word 0, and those of word 1, 2 bits further down
    6 bits  as if of 4 bits, the two others of each code in word 2
    8 bits  a word for two pairs, one in place and the other in the bits that are left

INT8's bits come out as an integer, which is no bfloat16 yet.
"""

from __future__ import annotations

from functools import cache

# For bits 0, 1, ... of a code.
LANDS: dict[str, tuple[int, ...]] = {
    "e2m1": (6, 7, 8, 15),
    "e2m3": (4, 5, 6, 7, 8, 15),
    "e3m2": (5, 6, 7, 8, 9, 15),
    "e4m3": (4, 5, 6, 7, 8, 9, 10, 15),
    "e5m2": (5, 6, 7, 8, 9, 10, 11, 15),
    "int8": (0, 1, 2, 3, 4, 5, 6, 7),
}
_FREE = (3, 4, 10, 11)  # the bits of a half that pairs 0..2 of 4 bits leave
# Of 8-bit codes, the second pair of a word: by bits of the bfloat16, the rotation.
_SECOND = {
    "e4m3": ((range(4, 7), 4), (range(7, 16), 12)),
    "e5m2": ((range(5, 10), 5), (range(10, 12), -2), (range(15, 16), 1)),
    "int8": ((range(8), -8),),
}


def words(element: str) -> int:
    """Of a group of 16 codes."""
    return len(LANDS[element]) // 2


def _source(element: str, pair: int, bit: int) -> tuple[int, int]:
    """(word, rotation to the left) that bring a bit of the pair to bit `bit` of each half."""
    if words(element) == 4:
        left = 0 if pair % 2 == 0 else next(r for bits, r in _SECOND[element] if bit in bits)
        return pair // 2, left
    if words(element) == 3 and bit not in LANDS["e2m1"]:
        # Bits 4 and 5: next to each other in word 2. 5 and 9: four apart.
        return 2, 4 - 2 * pair if element == "e2m3" else 5 - pair - pair // 4 * 4
    if pair < 6:
        return pair // 3, (0, 6, 10)[pair % 3]
    left = (2, 12)[pair - 6]
    return (0, left) if (bit - left) % 16 in _FREE else (1, left + 2)


@cache
def moves(element: str) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """For each pair: (word, rotation to the left 0..31, mask of what is taken after it)."""
    found = []
    for pair in range(8):
        masks: dict[tuple[int, int], int] = {}
        for bit in LANDS[element]:
            word, left = _source(element, pair, bit)
            masks[word, left % 32] = masks.get((word, left % 32), 0) | 0x10001 << bit
        found.append(tuple((*source, mask) for source, mask in sorted(masks.items())))
    return tuple(found)


@cache
def places(element: str) -> tuple[tuple[int, int, int, int, int], ...]:
    """(pair, half, word, mask, shift): code & mask, shifted left by `shift`, belongs into the word."""
    found = []
    for pair in range(8):
        for half in range(2):
            groups: dict[tuple[int, int], int] = {}
            for i, bit in enumerate(LANDS[element]):
                word, left = _source(element, pair, bit)
                shift = (bit + 16 * half - left) % 32 - i
                groups[word, shift] = groups.get((word, shift), 0) | 1 << i
            found += [(pair, half, word, mask, shift) for (word, shift), mask in groups.items()]
    return tuple(found)
