"""CUDA C++ compiled at run time, and launched: NVRTC and the driver through cuda-bindings."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from triton.runtime.cache import get_cache_manager

_OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17", "-default-device")


class CompileError(RuntimeError):
    """A kernel in CUDA C++ that does not compile or load here."""


@cache
def refuse() -> str | None:
    """None, or why nothing can be compiled here."""
    try:
        from cuda.bindings import nvrtc

        (error, *_) = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as why:
        # cuda-bindings raises its own kinds of RuntimeError where a library is missing.
        return f"CUDA C++ cannot be compiled: {' '.join(str(why).split())}"
    return None if error == nvrtc.nvrtcResult.NVRTC_SUCCESS else f"NVRTC says {error.name}"


def compiled(name: str, source: str, options: Sequence[str] = ()) -> tuple[bytes, str]:
    """Machine code for sm_90a, and what the compiler says besides.

    Raises:
        CompileError: the compiler's words.
    """
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    given = (*_OPTIONS, *options)
    (error,) = nvrtc.nvrtcCompileProgram(program, len(given), [option.encode() for option in given])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = _room(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    said = log.rstrip(b"\0").decode()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{name}: {said}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = _room(size)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return code, said


def kept(name: str, source: str) -> bytes:
    """Machine code as `compiled` gives it, from where Triton keeps its own (TRITON_CACHE_DIR), or put there now.

    A kernel with loops for ten numbers of tokens takes three seconds to compile.
    """
    from cuda.bindings import nvrtc

    key = sha256(repr((nvrtc.nvrtcVersion(), _OPTIONS, source)).encode()).hexdigest()
    files, file = get_cache_manager(key), f"{name}.cubin"
    there = files.get_file(file)
    if there is not None:
        return Path(there).read_bytes()
    code, _ = compiled(name, source)
    files.put(code, file)
    return code


def _room(size: int) -> bytes:
    """At least so many bytes, which NVRTC writes into. Python has each single byte only once, for everybody."""
    return bytes(size + 1)


@dataclass(frozen=True, eq=False)
class Kernel:
    """A function on a device, the shared memory that it is launched with, and the context that it was loaded in."""

    function: Any
    shared: int
    context: Any

    def launch(self, programs: int, threads: int, argument: ctypes.Structure, early: bool = False) -> None:
        """On PyTorch's current stream, whose device is the current one.

        Args:
            early: before the kernel ahead has ended, for which the function waits by itself.
        """
        from cuda.bindings import driver

        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], int(early)
        (error,) = driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0)
        if error == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            # PyTorch makes a thread no context current before it has to, and may have had memory left for its tensors.
            driver.cuCtxSetCurrent(self.context)
            (error,) = driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(pointers), 0)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"launching a kernel: {error.name}")


def kernel(name: str, source: str, function: str, shared: int, device: int) -> Kernel:
    """Compiled and loaded on a device.

    Args:
        shared: bytes of dynamic shared memory.

    Raises:
        CompileError: what the compiler or the driver says.
    """
    from cuda.bindings import driver

    code = kept(name, source)
    with torch.cuda.device(device):
        # PyTorch's own context, current in this thread, where nothing may have been computed yet.
        _, handle = driver.cuDeviceGet(device)
        _, context = driver.cuDevicePrimaryCtxRetain(handle)
        driver.cuCtxSetCurrent(context)
        error, module = driver.cuModuleLoadData(code)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise CompileError(f"{name} cannot be loaded: {error.name}")
        error, found = driver.cuModuleGetFunction(module, function.encode())
        if error != driver.CUresult.CUDA_SUCCESS:
            raise CompileError(f"{name} has no {function}: {error.name}")
        what = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (error,) = driver.cuFuncSetAttribute(found, what, shared)
        if error != driver.CUresult.CUDA_SUCCESS:
            raise CompileError(f"{name} cannot have {shared} bytes of shared memory: {error.name}")
    return Kernel(found, shared, context)
