"""Where a decoded token's time goes on a CUDA GPU: what its kernels take, as PyTorch's profiler sees them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from microscale.cli.timing import Timing

# Tokens before the profiler looks: the first ones run as they are, or are captured in a graph.
_BEFORE = 6
_LOOKED_AT = 8
# Triton calls a kernel as its function is called, and those in CUDA C++ are called after their file.
PARTS = {
    "_first_kernel": "experts",
    "_second_kernel": "experts",
    "_total_kernel": "experts",
    "_route_kernel": "experts",
    "_count_kernel": "experts",
    "_place_kernel": "experts",
    "_in_order_kernel": "experts",
    "_zero_kernel": "experts",
    "hopper_rings_kernel": "experts",
    "hopper_wide_kernel": "experts",
    "hopper_fp8_kernel": "experts",
    "hopper_linear_kernel": "linears",
    "_linear_kernel": "linears",
    "_rows_kernel": "linears",
    "_router_kernel": "linears",
    "_gate_kernel": "linears",
    "_likeliest_kernel": "linears",
    "_span_kernel": "attention",
    "_rms_norm_kernel": "norms",
    # Of experts' activations, too: a kernel's name does not say whose it rounds.
    "_numbers_kernel": "linears",
    "_codes_kernel": "linears",
    "_blocks_kernel": "linears",
    "_nvfp4_kernel": "linears",
}


def owns(kernels: Iterable[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """Of (name, start, end) each kernel's own time, in the order of their ends; no moment counts twice.

    A kernel may start while the one ahead of it runs, and waits for it. So its own time begins where those that ended
    before it had ended.
    """
    found, last = [], float("-inf")
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[2]):
        found.append((name, max(0.0, end - max(start, last))))
        last = max(last, end)
    return found


def shares(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Of (name, start, end) the time of each name, by `owns`."""
    found: dict[str, float] = {}
    for name, seconds in owns(kernels):
        found[name] = found.get(name, 0.0) + seconds
    return found


def split(times: dict[str, float]) -> tuple[dict[str, float], float]:
    """Times by name to those of our kernels, by part, and that of all others."""
    ours, others = dict.fromkeys(dict.fromkeys(PARTS.values()), 0.0), 0.0
    for name, seconds in times.items():
        if name in PARTS:
            ours[PARTS[name]] += seconds
        else:
            others += seconds
    return ours, others


@dataclass
class GpuWatch:
    """Times one generation, as `cpu_timing.Watch` does; some of its tokens run under the profiler and are not timed."""

    bytes: int
    device: torch.device
    lost: float = 0.0  # seconds spent in here
    _arrivals: list[float] = field(default_factory=list)
    _profiler: Any = None
    _seen: dict[str, float] = field(default_factory=dict)  # seconds a token, by kernel
    _stopped: int = 0  # tokens that had come when the profiler stopped

    @contextmanager
    def running(self) -> Iterator[None]:
        """While the model generates."""
        try:
            yield
        finally:
            self._stop()

    def token(self) -> None:
        """Note a token; the profiler starts behind one and stops behind another. `lost` grows by what this takes."""
        started = time.perf_counter()
        self._arrivals.append(started - self.lost)
        if len(self._arrivals) == _BEFORE:
            self._start()
        elif len(self._arrivals) == _BEFORE + _LOOKED_AT:
            self._stop()
        self.lost += time.perf_counter() - started

    def _start(self) -> None:
        torch.cuda.synchronize(self.device)
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profiler.start()

    def _stop(self) -> None:
        if self._profiler is None:
            return
        torch.cuda.synchronize(self.device)
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._stopped, count = len(self._arrivals), len(self._arrivals) - _BEFORE
        if count:
            self._seen = {name: seconds / count for name, seconds in shares(events(profiler)).items()}

    def result(self) -> Timing | None:
        """Of the tokens behind the profiled ones, else of all; None where there are not two, or none was profiled."""
        if len(self._arrivals) < 2 or not self._seen:
            return None
        times = self._arrivals[self._stopped :]
        if len(times) < 2:
            times = self._arrivals
        ours, others = split(self._seen)
        from microscale.bench.gpu import read_rate

        rate = read_rate(min(1 << 30, torch.cuda.mem_get_info(self.device)[0] // 4), self.device)
        return Timing((times[-1] - times[0]) / (len(times) - 1), ours, self.bytes, rate * 1e9, others)


def events(profiler: Any) -> list[tuple[str, float, float]]:
    """(name, start, end) in seconds of what ran on the GPU, copies and fills too."""
    on_gpu = (e for e in profiler.events() if e.device_type == DeviceType.CUDA)
    return [(e.name, e.time_range.start * 1e-6, e.time_range.end * 1e-6) for e in on_gpu]
