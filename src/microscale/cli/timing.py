"""Where a decoded token's time goes, and how much of it the machine needs to read the weights at the least."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from microscale.backends import cpu_core
from microscale.bench.ceilings import Probe
from microscale.cli.output import human
from microscale.env import CPU_LEVELS
from microscale.machine import cache_bytes

_EVERY = 4  # tokens between two looks at how fast the machine reads
_ROUND = 256 << 20  # bytes that are read round, or eight times the caches
_PARTS = {
    "moe": "experts",
    "linear": "linears",
    "dense": "linears",
    "attend": "attention",
    "rms_norm": "norms",
}


@dataclass(frozen=True)
class Timing:
    """A decoded token, on average.

    Attributes:
        token: seconds.
        kernels: seconds of it inside the C++ core, or in our kernels, by what ran: "experts", "linears", "attention",
            "norms".
        bytes: of weights that it reads; activations and the key/value cache are left out.
        read_rate: bytes a second that the machine read between the tokens, the median; a GPU behind them.
        others: seconds of it in a GPU's other kernels; None: it ran on a CPU.
    """

    token: float
    kernels: dict[str, float]
    bytes: int
    read_rate: float
    others: float | None = None

    @property
    def outside(self) -> float:
        """Seconds in none of these kernels: Python, a CPU's other operators, a GPU that waits."""
        return self.token - sum(self.kernels.values()) - (self.others or 0.0)

    @property
    def of_floor(self) -> float:
        """The time that the machine needs to read the weights, as a fraction of a token's."""
        return self.bytes / self.read_rate / self.token

    def document(self) -> dict[str, Any]:
        """For JSON: seconds, bytes, bytes a second."""
        return {
            "token_seconds": self.token,
            "kernel_seconds": self.kernels,
            **({} if self.others is None else {"other_kernel_seconds": self.others}),
            "outside_seconds": self.outside,
            "weight_bytes_per_token": self.bytes,
            "read_rate": self.bytes / self.token,
            "ceiling_read_rate": self.read_rate,
            "of_floor": self.of_floor,
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in self.kernels.items())
        if self.others is not None:
            parts += f", kernels of others {self.others * 1e3:.3g}"
        return (
            f"a token takes {self.token * 1e3:.3g} ms: {parts}, all else {self.outside * 1e3:.3g}; "
            f"it reads {human(self.bytes)} at {self.bytes / self.token / 1e9:.3g} GB/s, "
            f"{self.of_floor:.2f} of the {self.read_rate / 1e9:.3g} GB/s that this machine read in between"
        )


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
