"""Times of one case, with the ceilings of the same moments."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from microscale.bench.ceilings import Ceilings, Probe
from microscale.bench.layers import Call

FEWEST = 5  # timings, however long one takes
BUDGET = 2.0  # seconds of calls after which there are no more than that
LONG = 0.25  # seconds of a call that needs none before it to be warm
PROBES = 8  # of the ceilings, spread over a case

Clock = Callable[[], float]


@dataclass(frozen=True)
class Times:
    """The timings of one case.

    Attributes:
        seconds, bytes: of each timed call: how long it took, and what it had to read.
        flops: of one call.
        ceilings: medians of those probed between them.
    """

    seconds: tuple[float, ...]
    bytes: tuple[int, ...]
    flops: int
    ceilings: Ceilings

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)

    @property
    def read_rate(self) -> float:
        """Bytes a second that the weights alone come to."""
        return median(b / s for b, s in zip(self.bytes, self.seconds, strict=True))

    @property
    def flop_rate(self) -> float:
        """FLOPs a second."""
        return self.flops / self.median

    @property
    def bound(self) -> str:
        """Which ceiling makes the floor: "memory" or "compute"."""
        reading = median(self.bytes) / self.ceilings.read
        return "memory" if reading >= self.flops / self.ceilings.multiply else "compute"

    @property
    def of_floor(self) -> float:
        """The floor as a fraction of the time: 1 is as fast as this machine can."""
        pairs = zip(self.bytes, self.seconds, strict=True)
        return median(self.ceilings.floor(b, self.flops) / s for b, s in pairs)

    def document(self) -> dict[str, Any]:
        """For JSON. Units are in the names; bytes and FLOPs per second."""
        return {
            "seconds_median": self.median,
            "seconds_min": min(self.seconds),
            "seconds_max": max(self.seconds),
            "seconds": list(self.seconds),
            "weight_bytes_median": median(self.bytes),
            "flops": self.flops,
            "read_rate": self.read_rate,
            "flop_rate": self.flop_rate,
            "ceiling_read_rate": self.ceilings.read,
            "ceiling_flop_rate": self.ceilings.multiply,
            "bound": self.bound,
            "of_floor": self.of_floor,
        }


def timed(call: Call, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call."""
    start = clock()
    call.run()
    return clock() - start


def measure(
    kinds: Sequence[Callable[[], Call]],
    probe: Probe,
    repeat: int,
    *,
    pause: float = 0.0,
    clock: Clock = time.perf_counter,
) -> tuple[Times, ...]:
    """Time calls of each kind in turn, with the ceilings probed between the turns.

    Each call comes after an untimed one, unless they are long.

    Args:
        kinds: make the next call of their kind; untimed.
        repeat: timings of each; fewer, but at least `FEWEST`, once they take `BUDGET` seconds together.
        pause: seconds of sleep in front of each, in which the threads of the kind before stop spinning.
        clock: `time.thread_time` counts the calling thread's own time, for one thread on a machine that others use.
    """
    first, spent, every = len(probe.reads), 0.0, max(1, repeat // PROBES)
    calls: list[list[tuple[float, Call]]] = [[] for _ in kinds]
    for i in range(repeat):
        if i >= FEWEST and spent > BUDGET * len(kinds):
            break
        if i % every == 0:
            probe.once()
        for fresh, done in zip(kinds, calls, strict=True):
            time.sleep(pause)
            if not done or done[-1][0] < LONG:
                spent += timed(fresh(), clock)
            call = fresh()
            done.append((timed(call, clock), call))
            spent += done[-1][0]
    ceilings = probe.since(first)
    return tuple(
        Times(tuple(s for s, _ in done), tuple(c.bytes for _, c in done), done[0][1].flops, ceilings)
        for done in calls
    )
