"""What the scripts beside this file have in common: a busy neighbour, and the table of ratios."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from microscale import __version__
from microscale.machine import cache_bytes, detect


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """An unrelated process that spins on one of our processors."""
    if not wanted:
        yield
        return
    core = max(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def numbers(text: str) -> list[int]:
    """ "1,4" -> [1, 4]."""
    return [int(word) for word in text.split(",")]


def environment(peer: str, version: str, threads: int, busy: bool) -> dict[str, Any]:
    """What the figures depend on, for JSON."""
    machine = detect()
    return {
        "peer": peer,
        "peer_version": version,
        "microscale": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": machine.cpu,
        "level": machine.level,
        "cores": machine.cores,
        "memory_bytes": machine.memory,
        "cache_bytes": cache_bytes(),
        "threads": threads,
        "busy": busy,
    }


def ratio(peer: list[float], ours: list[float]) -> tuple[float, float]:
    """How many times longer the peer takes: by medians, and by the fastest of each."""
    return median(peer) / median(ours), min(peer) / min(ours)


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns of equal width; the first row is the head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def save(path: Path | None, document: dict[str, Any]) -> None:
    """JSON into a file, if one is wanted."""
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n")
