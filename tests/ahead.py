"""Work that tests wait for, begun with the first test: most tests take one processor, and compilers have the others.

A test module that has such work says by `ahead(item)` what a test will wait for, as pairs of a function and its only
argument, both of which can be pickled, and later gets the result of `begun`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from multiprocessing import active_children, get_context
from typing import Any

import torch


@cache
def pool() -> ProcessPoolExecutor:
    """A process for each processor: compilers hold Python's lock. Fresh ones, since torch's threads do not fork."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=_stand_back)


def _stand_back() -> None:
    """Tests that are at work meanwhile come first. A session of its own: what this process starts ends with it."""
    if hasattr(os, "setsid"):
        os.setsid()
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(10)


@cache
def begun(function: Callable[[Any], Any], job: Any) -> Future[Any]:
    """What `function` makes of a job, in one of the pool's processes, which begins at the first call."""
    return pool().submit(function, job)


def all_of(function: Callable[[Any], Any], jobs: Iterable[Any]) -> dict[Any, Any]:
    """`function` of each job, on all processors."""
    waiting = {job: begun(function, job) for job in jobs}
    return {job: result.result() for job, result in waiting.items()}


def end() -> None:
    """What nobody waits for any more does not begin, nor go on."""
    if not pool.cache_info().currsize:
        return
    pool().shutdown(wait=False, cancel_futures=True)
    for process in active_children():
        try:
            os.killpg(process.pid, signal.SIGTERM)
        except (AttributeError, ProcessLookupError):  # not on every platform; it has no session yet
            process.terminate()
