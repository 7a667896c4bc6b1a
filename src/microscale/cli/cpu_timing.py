"""Where a decoded token's time goes on a CPU: what the C++ core's kernels take, as the core sees them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch

from microscale.backends import cpu_core
from microscale.bench.ceilings import Probe
from microscale.cli.timing import Timing
from microscale.env import CPU_LEVELS
from microscale.machine import cache_bytes

_EVERY = 4  # tokens between two looks at how fast the machine reads
_ROUND = 256 << 20  # bytes that are read round, or eight times the caches
_PARTS = {
    "moe": "experts",
    "linear": "linears",
    "dense": "linears",
    "stored": "linears",
    "attend": "attention",
    "rms_norm": "norms",
    "embed": "linears",
    "gate": "linears",
    "route": "experts",
}


@dataclass
class Watch:
    """Times one generation. `token` is called as each token arrives."""

    bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    lost: float = 0.0  # seconds spent in here
    _arrivals: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        level, cache = CPU_LEVELS[cpu_core.level()], cache_bytes()
        size = max(_ROUND, 8 * cache)
        self._probe = Probe(level, torch.get_num_threads(), cache, 4 * size)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the model generates."""
        with cpu_core.timed(self.seconds):
            yield

    def token(self) -> None:
        """Note a token, and now and then how fast the machine reads; `lost` grows by what this takes."""
        started = time.perf_counter()
        self._arrivals.append((started - self.lost, dict(self.seconds)))
        if len(self._arrivals) % _EVERY == 1:
            self._probe.read()
        self.lost += time.perf_counter() - started

    def result(self) -> Timing | None:
        """From the first token to the last; None where there are not two."""
        if len(self._arrivals) < 2:
            return None
        (start, before), (stop, after) = self._arrivals[0], self._arrivals[-1]
        count = len(self._arrivals) - 1
        kernels: dict[str, float] = {}
        for name, seconds in after.items():
            part = _PARTS.get(name, name)
            kernels[part] = kernels.get(part, 0.0) + (seconds - before.get(name, 0.0)) / count
        return Timing((stop - start) / count, kernels, self.bytes, median(self._probe.reads))
