"""Where a kernel of Hopper's cannot be compiled: the kernels for every target take over, with one warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

from torch import Tensor
from triton.errors import TritonError

from microscale.backends.triton.nvrtc import CompileError

_MLIR = ("PassManager::run failed", "error encountered during parsing")
_failed: set[tuple[Hashable, ...]] = set()


def attempt(fast: Callable[[], Tensor], plain: Callable[[], Tensor], *what: Hashable) -> Tensor:
    """`fast`, or `plain` if a kernel of it does not compile; then `fast` is not tried again for the same `what`."""
    if what not in _failed:
        try:
            return fast()
        except (TritonError, RuntimeError) as error:
            # MLIR raises a bare RuntimeError, as do things that are none of ours.
            if not isinstance(error, TritonError | CompileError) and str(error) not in _MLIR:
                raise
            _failed.add(what)
            warnings.warn(
                f"Hopper's kernel cannot be compiled for {' '.join(map(str, what))} "
                f"({str(error).partition(chr(10))[0]}); slower kernels run instead",
                stacklevel=2,
            )
    return plain()
