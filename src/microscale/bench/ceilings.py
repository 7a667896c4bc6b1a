"""What the machine can do at most: streaming reads from memory, and multiplication in registers."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from statistics import median

import torch

from microscale import _core
from microscale.env import CPU_LEVELS

_LEAST = 1 << 30  # bytes read round, where memory allows
_WINDOW = 64 << 20  # bytes read in one probe
_GRAIN = 1 << 20


@dataclass(frozen=True)
class Ceilings:
    """Rates of one machine, level and number of threads.

    Attributes:
        read: bytes a second.
        multiply: FLOPs a second.
    """

    read: float
    multiply: float

    def floor(self, bytes: float, flops: float) -> float:
        """Seconds below which nothing can read so much and compute so much."""
        return max(bytes / self.read, flops / self.multiply)


@dataclass
class Probe:
    """Measures both ceilings, again and again, between what is timed.

    Reads go round through memory of which the caches can hold a small part at most.

    Args:
        level: of the C++ core; multiplication is that level's.
        threads: that read and multiply together.
        cache: bytes of the machine's last-level caches.
        memory: bytes of RAM; at most a quarter is used.
    """

    level: str
    threads: int
    cache: int
    memory: int
    reads: list[float] = field(default_factory=list)
    multiplies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = max(_LEAST, 4 * self.cache)
        if self.memory:
            size = min(size, self.memory // 4)
        size = max(size // _GRAIN, 1) * _GRAIN
        room = torch.empty(size + 64, dtype=torch.uint8)
        start = -room.data_ptr() % 64
        # Written, because pages that are only read all show the system's one page of zeros.
        self._memory = room[start : start + size].fill_(1)
        self._window, self._at = min(_WINDOW, size), 0

    def at(self, level: str) -> Probe:
        """A probe of another level that reads round through the same memory."""
        other = copy(self)
        other.level, other.reads, other.multiplies = level, [], []
        return other

    def read(self) -> float:
        """Probe reading alone; takes a few ms."""
        if self._at + self._window > self._memory.numel():
            self._at = 0
        self.reads.append(_core.read_rate(self._memory.data_ptr() + self._at, self._window, self.threads))
        self._at += self._window
        return self.reads[-1]

    def once(self) -> Ceilings:
        """Probe both now; takes some 30 ms."""
        self.read()
        self.multiplies.append(_core.multiply_rate(CPU_LEVELS.index(self.level), self.threads))
        return Ceilings(self.reads[-1], self.multiplies[-1])

    def since(self, first: int) -> Ceilings:
        """Medians of the probes from the `first`-th on."""
        return Ceilings(median(self.reads[first:]), median(self.multiplies[first:]))
