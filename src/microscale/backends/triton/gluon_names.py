"""Functions of Gluon that Triton's versions name differently; 3.6 to 3.9 are known here."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# Since 3.7.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# Since 3.8. The names of before are still there in 3.9, to say that they are gone.
_before = "async_copy_global_to_shared"
load_shared = getattr(async_copy, "async_load", None) or getattr(async_copy, _before)
load_box = getattr(tma, "async_load", None) or getattr(tma, _before)


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def reinterpret(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        """The same bytes of shared memory in another shape and layout; so since 3.9."""
        return memory.reinterpret(DTYPE, SHAPE, LAYOUT)
else:

    @gluon.jit
    def reinterpret(memory, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
        return memory._reinterpret(DTYPE, SHAPE, LAYOUT)
