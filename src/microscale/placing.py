"""One thread at a time places a layer: others that call it before it is placed would pack it as well, and read tensors
that have just been emptied. One lock is for all layers, as they share what their placer has proved.
"""

from __future__ import annotations

import os
from threading import RLock

_lock = RLock()


def placing() -> RLock:
    """What a thread holds while it places."""
    return _lock


def _anew() -> None:
    """A forked child has none of its parent's other threads, of which one may have held the lock."""
    global _lock
    _lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)
