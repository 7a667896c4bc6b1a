"""Where a token's time goes on a GPU: from kernels' names and times, without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import microscale.backends
from microscale.cli import gpu_timing
from microscale.cli.gpu_timing import PARTS, GpuWatch, shares, split


def test_no_moment_counts_twice() -> None:
    kernels = [("a", 0.0, 4.0), ("b", 1.0, 6.0), ("c", 2.0, 3.0), ("a", 8.0, 9.0), ("d", 5.0, 5.5)]
    assert shares(kernels) == pytest.approx({"c": 1.0, "a": 2.0, "d": 0.5, "b": 0.5})
    assert shares([]) == {}


def test_ours_are_told_from_others() -> None:
    ours, others = split(
        {
            "_first_kernel": 1.0,
            "_total_kernel": 2.0,
            "_rows_kernel": 3.0,
            "_gate_kernel": 0.5,
            "nvjet": 4.0,
            "add": 5.0,
        }
    )
    assert ours == {"experts": 3.0, "linears": 3.5, "attention": 0.0, "norms": 0.0}
    assert others == 9.0


def test_every_kernel_of_ours_has_a_part() -> None:
    folder = Path(microscale.backends.__file__).parent / "triton"
    written = {
        name for f in folder.glob("*.py") for name in re.findall(r"^def (_\w+_kernel)\(", f.read_text(), re.M)
    }
    in_cuda = {f"{f.stem}_kernel" for f in folder.glob("*.cu")}
    assert len(in_cuda) == 4
    assert written | in_cuda == set(PARTS)


@pytest.mark.parametrize("tokens, timed", [(30, 16), (14, 14), (9, 9), (6, 0), (1, 0)])
def test_some_tokens_are_looked_at(monkeypatch: pytest.MonkeyPatch, tokens: int, timed: int) -> None:
    """A second each, and two under the profiler; starting it takes ten, which are not the generation's."""
    now, running = [0.0], []

    class Profiler:
        def __init__(self, activities: Any) -> None:
            self.stopped = False

        def start(self) -> None:
            now[0] += 10
            running.append(self)

        def stop(self) -> None:
            running.remove(self)
            self.count = int(steps[0])

        def events(self) -> list[Any]:
            kinds = (
                ("_first_kernel", torch.autograd.DeviceType.CUDA),
                ("on the host", torch.autograd.DeviceType.CPU),
            )
            return [
                SimpleNamespace(
                    name=n, device_type=k, time_range=SimpleNamespace(start=i * 1e6, end=i * 1e6 + 5e5)
                )
                for i in range(self.count)
                for n, k in kinds
            ]

    steps = [0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 33, 1 << 34))
    monkeypatch.setattr(gpu_timing.time, "perf_counter", lambda: now[0])
    bench = pytest.importorskip("microscale.bench.gpu", reason="the package triton is not installed")
    monkeypatch.setattr(bench, "read_rate", lambda size, device: 4000.0)
    watch = GpuWatch(10**9, torch.device("cpu"))
    with watch.running():
        for _ in range(tokens):
            now[0] += 2 if running else 1
            steps[0] += bool(running)
            watch.token()
    assert not running
    found = watch.result()
    if not timed:
        assert found is None
        return
    assert found is not None
    assert found.kernels == pytest.approx({"experts": 0.5, "linears": 0.0, "attention": 0.0, "norms": 0.0})
    assert found.others == 0.0
    assert found.token == pytest.approx(1.0 if timed == 16 else (tokens - 1 + tokens - 6) / (tokens - 1))
    assert found.of_floor == pytest.approx(1e9 / 4e12 / found.token)
    assert found.outside == pytest.approx(found.token - 0.5)
    assert "kernels of others 0" in str(found)


def test_it_needs_no_core() -> None:
    """A machine with a GPU may have no compiler, and so no core."""
    block = "import sys; sys.modules['microscale._core'] = None; import microscale.cli.gpu_timing"
    result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
