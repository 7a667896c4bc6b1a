"""Giving mapped file pages back to the system once nothing reads them any more."""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor

_DONTNEED, _PAGEOUT = 4, 21  # madvise(2)


def give_back(tensors: Iterable[Tensor]) -> None:
    """Let go of the memory behind tensors that are views of mapped files. What they read as never changes.

    The file stays mapped as long as any tensor of it is alive, and with it every page that was ever touched: without
    this, weights that were repacked would be in memory twice. Only Linux says which memory is a file's; elsewhere,
    and where the system refuses, the pages stay until it needs room.
    """
    if sys.platform != "linux":
        return
    mappings = _file_mappings()
    starts = [start for start, _, _ in mappings]
    for t in tensors:
        first = t.data_ptr()
        i = bisect_right(starts, first) - 1
        if i < 0 or first + t.nbytes > mappings[i][1]:
            continue
        start, stop = (
            -(-first // mmap.PAGESIZE) * mmap.PAGESIZE,
            (first + t.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE,
        )
        if start < stop:
            # Where we may write, a page may differ from the file's, and only paging out keeps it.
            _libc().madvise(
                ctypes.c_void_p(start),
                ctypes.c_size_t(stop - start),
                _PAGEOUT if mappings[i][2] else _DONTNEED,
            )


def _file_mappings() -> list[tuple[int, int, bool]]:
    """(first address, end, writable) of this process's mapped files, ascending."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            addresses, access, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0":
                start, stop = (int(a, 16) for a in addresses.split("-"))
                found.append((start, stop, "w" in access))
    return found


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)
