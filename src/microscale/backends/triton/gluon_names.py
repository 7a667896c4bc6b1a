"""Functions of Gluon that Triton's versions name differently; 3.6 to 3.9 are known here."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# Since 3.7.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# Since 3.8. The names of before are still there in 3.9, to say that they are gone.
_before = "async_copy_global_to_shared"
load_shared = getattr(async_copy, "async_load", None) or getattr(async_copy, _before)
load_box = getattr(tma, "async_load", None) or getattr(tma, _before)
# Since 3.9: the same bytes of shared memory in another shape and layout.
_descriptor = gl.shared_memory_descriptor
reinterpret = getattr(_descriptor, "reinterpret", None) or _descriptor._reinterpret
