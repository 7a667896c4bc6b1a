"""A forked child that computes: it has none of its parent's threads, and GNU OpenMP, PyTorch's on Linux, does not know.

A child whose parent has computed on two threads or more waits for ever at its first large operator of PyTorch's; the
core's own pool (csrc/parallel.cc) starts over by itself. OpenMP 5.0 has a call that lets a runtime's idle threads go,
and PyTorch's next operator starts others. It is called ahead of `os.fork`, which `multiprocessing` uses, too.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

_SOFT = 1  # omp_pause_soft: what was set stays so, the number of threads as well


@cache
def survive_forks() -> None:
    """From now on the threads of OpenMP that belong to the calling thread are let go ahead of each fork."""
    pause = _pause()
    if pause is not None:
        os.register_at_fork(before=lambda: pause(_SOFT))


def _pause() -> ctypes._NamedFuncPointer | None:
    """None: this system does not fork, or PyTorch has no OpenMP, or one of before 5.0."""
    if not hasattr(os, "fork"):
        return None
    try:
        return ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError):
        return None
