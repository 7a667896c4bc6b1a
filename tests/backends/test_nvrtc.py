"""CUDA C++ compiled without a GPU, and launched by a driver that is none."""

from __future__ import annotations

import ctypes
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

EMPTY = 'extern "C" __global__ void empty() {}'


class Nothing(ctypes.Structure):
    """The argument of a kernel that looks at none."""


@pytest.fixture(scope="module")
def nvrtc() -> Any:
    found = import_module("microscale.backends.triton.nvrtc")
    if found.refuse() is not None:
        pytest.skip(found.refuse())
    return found


def test_a_compiler_with_nothing_to_say_leaves_pythons_bytes_alone(nvrtc: Any) -> None:
    code, said = nvrtc.compiled("empty.cu", EMPTY)
    assert said == ""
    assert code[1:4] == b"ELF"
    # There is one object for every single byte, and the log was a single one.
    assert list(range(256)) == [bytes([value])[0] for value in range(256)]


def test_what_does_not_compile_says_why(nvrtc: Any) -> None:
    with pytest.raises(nvrtc.CompileError, match=r"broken\.cu[\s\S]*undefined"):
        nvrtc.compiled("broken.cu", 'extern "C" __global__ void broken() { no_such_thing(); }')


@pytest.fixture
def kept(nvrtc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`nvrtc.kept`, with nothing kept yet."""
    monkeypatch.setattr(import_module("triton").knobs.cache, "dir", str(tmp_path))
    return nvrtc.kept


def test_machine_code_is_compiled_once(
    nvrtc: Any, kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = kept("empty.cu", EMPTY)
    assert code == nvrtc.compiled("empty.cu", EMPTY)[0]
    monkeypatch.setattr(nvrtc, "compiled", lambda name, source: (source.encode(), ""))
    assert kept("empty.cu", EMPTY) == code
    assert kept("empty.cu", EMPTY + " ") == EMPTY.encode() + b" "
    assert len(list(tmp_path.rglob("empty.cu.cubin"))) == 2


def test_what_does_not_compile_is_not_kept(nvrtc: Any, kept: Any, tmp_path: Path) -> None:
    with pytest.raises(nvrtc.CompileError, match=r"broken\.cu"):
        kept("broken.cu", "no")
    assert not list(tmp_path.rglob("*.cubin"))


@pytest.mark.parametrize("cold", [True, False])
def test_a_thread_that_has_computed_nothing_gets_the_kernels_context(
    nvrtc: Any, monkeypatch: pytest.MonkeyPatch, cold: bool
) -> None:
    driver = import_module("cuda.bindings.driver")
    current, launched = [None if cold else "the kernel's"], []

    def launch(config: Any, function: Any, *rest: Any) -> tuple[Any]:
        if current[0] is None:
            return (driver.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        launched.append((function, config.gridDimX, config.blockDimX, config.sharedMemBytes, config.numAttrs))
        return (driver.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(driver, "cuLaunchKernelEx", launch)
    monkeypatch.setattr(driver, "cuCtxSetCurrent", lambda context: current.__setitem__(0, context))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    nvrtc.Kernel("f", 1024, "the kernel's").launch(132, 384, Nothing(), early=True)
    assert launched == [("f", 132, 384, 1024, 1)]
    assert current == ["the kernel's"]


def test_a_launch_that_fails_says_why(nvrtc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = import_module("cuda.bindings.driver")
    failed = (driver.CUresult.CUDA_ERROR_INVALID_VALUE,)
    monkeypatch.setattr(driver, "cuLaunchKernelEx", lambda *_: failed)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    with pytest.raises(RuntimeError, match="launching a kernel: CUDA_ERROR_INVALID_VALUE"):
        nvrtc.Kernel("f", 0, None).launch(1, 32, Nothing())
