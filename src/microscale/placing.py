"""One thread at a time places a layer: others that call it before it is placed would pack it as well, and read tensors
that have just been emptied. One lock is for all layers, as they share what their placer has proved.

What they place outlives a transform of torch.func that they may be called under, and so is made outside of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from microscale.backends.autograd import untransformed

_lock = RLock()


@contextmanager
def placing() -> Iterator[None]:
    """What a thread is in while it places."""
    with _lock, untransformed():
        yield


def _anew() -> None:
    """A forked child has none of its parent's other threads, of which one may have held the lock."""
    global _lock
    _lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)
