"""The triton backend: its refusals, its layout, its kernels in the interpreter and on a GPU."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_ahead import random_bytes

from ahead import begun
from microscale.activations import GPT_OSS
from microscale.backends.triton_rules import (
    BLOCKS,
    UNITS,
    refuse,
    refuse_blocks,
    uncompiled,
    unproven,
    yields,
)
from microscale.formats import FORMATS
from microscale.invented import INVENTED
from microscale.machine import Gpu
from microscale.oracle import Problem
from placed_layers import assert_same

NO_TRITON = str(refuse(Problem("linear", "mxfp4", 64, 64, device="cuda", arch="sm_90")))
LINEAR = Problem("linear", "mxfp4", 33, 95)
MOE = Problem(
    "moe", "nvfp4", 2880, 2880, intermediate=2880, experts=32, top_k=4, activation=GPT_OSS, bias=True
)


@pytest.mark.parametrize("name", ["a100", "h200", "b200", "mi300x", "mi355x", "arc-b580"])
@pytest.mark.parametrize("weight", FORMATS)
def test_every_format_is_taken_on_every_gpu_that_triton_reaches(name: str, weight: str) -> None:
    for problem in (LINEAR, MOE):
        for dtype in ("bf16", "fp16", "fp32"):
            assert refuse(replace(problem, weight=weight, dtype=dtype).on(INVENTED[name])) is None


def test_refusals() -> None:
    h200 = INVENTED["h200"]
    assert refuse(LINEAR.on(INVENTED["zen5"])) == "Triton compiles for CUDA, ROCm and XPU, not for cpu"
    assert refuse(LINEAR.on(INVENTED["mac"])) == "Triton compiles for CUDA, ROCm and XPU, not for mps"
    assert refuse(LINEAR.on(replace(h200, packages=()))) == "the package triton is not installed"
    for arch, why in (("sm_70", "sm_70"), ("", "unknown")):
        old = replace(h200, gpus=(Gpu("cuda", arch, "old", 1),))
        assert refuse(LINEAR.on(old)) == f"the kernels need sm_75 or newer, and this is {why}"
    for arch in ("sm_75", "sm_89", "sm_120", "sm_100a"):
        assert refuse(LINEAR.on(replace(h200, gpus=(Gpu("cuda", arch, "new", 1),)))) is None
    why = refuse(replace(MOE, act="nvfp4").on(h200))
    assert why == "activations are multiplied as bf16 numbers or as FP8 codes, and those of nvfp4 are neither"
    assert refuse(LINEAR.on(INVENTED["mi300x"])) is None


def test_activations_in_nvfp4_are_refused_by_what_units_there_are() -> None:
    """Where there are some, the pair or the version of Triton is the reason."""
    spark = replace(INVENTED["rtx5090"], gpus=(Gpu("cuda", "sm_121", "NVIDIA GB10", 1),))
    nvfp4 = replace(LINEAR, weight="nvfp4", act="nvfp4")
    why = "block-scaled products for sm_121 need Triton 3.8 or newer, and this is 3.6.0"
    assert refuse(nvfp4.on(spark)) == why
    assert refuse(nvfp4.on(replace(spark, packages=(("triton", "3.8.0"),)))) is None
    why = "gfx950 has block-scaled units, but not for scales of nvfp4"
    assert refuse(nvfp4.on(INVENTED["mi355x"])) == why
    why = "Triton's block-scaled product takes MXFP4 and MXFP8, or NVFP4 twice, not mxfp4 and nvfp4"
    assert refuse(replace(nvfp4, weight="mxfp4").on(INVENTED["b200"])) == why


def test_an_xpu_without_a_name_is_none_of_an_unknown_make() -> None:
    """PyTorch tells no architecture of them."""
    arc = replace(INVENTED["arc-b580"], gpus=(Gpu("xpu", "", "Intel Arc B580", 1),))
    said = "it widens activations in mxfp4 to bf16: Triton has no block-scaled product for xpu"
    assert yields(replace(LINEAR, act="mxfp4").on(arc)) == said


def test_pairs_of_codes_that_no_unit_takes_are_told() -> None:
    assert refuse_blocks("sm_100", "mxfp4", "mxfp8_e5m2") is None
    assert refuse_blocks("sm_103", "mxfp8_e4m3", "mxfp4") is None
    for arch in ("sm_90", "sm_130", "gfx942", "xe2", ""):
        assert "has no block-scaled product for" in str(refuse_blocks(arch, "mxfp4", "mxfp4"))
    for arch, least in UNITS.items():
        assert refuse_blocks(arch, "mxfp4", "mxfp4", f"{least}.0") is None
        assert f"need Triton {least} or newer" in str(refuse_blocks(arch, "mxfp4", "mxfp4", "3.5.1"))
    assert refuse_blocks("sm_100a", "mxfp4", "mxfp4") is None
    assert "not 4 and 8 bits" in str(refuse_blocks("sm_120", "mxfp4", "mxfp8_e4m3"))
    for weight, act in (("mxint8", "mxint8"), ("nvfp4", "mxfp4"), ("mxfp6_e2m3", "mxfp8_e4m3")):
        assert f"not {weight} and {act}" in str(refuse_blocks("gfx950", weight, act))
    assert refuse_blocks("sm_120", "nvfp4", "nvfp4") is None
    assert "but not for scales of nvfp4" in str(refuse_blocks("gfx950", "nvfp4", "nvfp4"))


def test_a_version_of_triton_without_hopper_kernels_is_told() -> None:
    def of(version: str, arch: str = "sm_90") -> Any:
        h200 = INVENTED["h200"]
        return replace(h200, packages=(("triton", version),), gpus=(Gpu("cuda", arch, "a GPU", 1),))

    for version in ("3.6.0", "3.7.1", "3.8.0", "3.9.0"):
        assert unproven(of(version)) is None
    assert "Triton 3.6 to 3.9; with 3.10.0 the slower ones" in str(unproven(of("3.10.0")))
    assert unproven(of("3.10.0", "sm_100")) is None
    assert unproven(replace(of("3.10.0"), packages=())) is None


def test_every_launch_says_whether_products_and_sums_are_fused() -> None:
    """Triton 3.10 has another default."""
    import microscale.backends.triton_rules as beside

    launches = 0
    for file in Path(str(beside.__file__)).with_name("triton").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                if not ast.unparse(node.func.value).endswith("_kernel"):
                    continue
                launches += 1
                spread = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
                told = [
                    s for s in spread if s.startswith(("tiles.launch(", "launch")) or s.endswith(".compiler")
                ]
                assert len(told) == 1, f"{file.name}:{node.lineno}: {ast.unparse(node.func)}"
    assert launches > 10


def test_doctor_says_what_a_hopper_loses_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    from microscale.backends.triton import nvrtc

    h200 = INVENTED["h200"]
    monkeypatch.setattr(nvrtc, "refuse", lambda: "CUDA C++ cannot be compiled: no module")
    assert str(uncompiled(h200)).startswith("CUDA C++ cannot be compiled: no module. For many tokens slower")
    assert uncompiled(replace(h200, packages=())) is None
    assert uncompiled(INVENTED["b200"]) is None
    monkeypatch.setattr(nvrtc, "refuse", lambda: None)
    assert uncompiled(h200) is None


@pytest.fixture
def layout() -> Any:
    pytest.importorskip("triton", reason=NO_TRITON)
    from microscale.backends.triton import layout

    return layout


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 31), (33, 97), (129, 128), (5, 259), (3, 7, 65), (2, 130, 300)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_unpack_is_the_exact_inverse_of_pack(layout: Any, name: str, shape: tuple[int, ...]) -> None:
    w = random_bytes(name, shape)
    back = layout.unpack(layout.pack(w))
    assert_same(back, w)


@pytest.mark.parametrize(
    "shape", [(3, 31), (33, 97), (129, 256), (5, 259), (3, 7, 65), (2, 130, 384), (0, 64)]
)
@pytest.mark.parametrize("name", [*BLOCKS, "nvfp4"])
def test_codes_for_block_scaled_units_are_the_canonical_ones(
    layout: Any, name: str, shape: tuple[int, ...]
) -> None:
    from microscale.backends.triton import blocks

    w = random_bytes(name, shape)
    if name == "nvfp4":
        w.scales.bitwise_and_(0x7F)  # those have no sign
    packed = blocks.pack(w)
    assert_same(blocks.unpack(packed), w)
    assert (packed.codes.data_ptr() == w.codes.data_ptr()) == (shape[-1] % 128 == 0 or 0 in shape)
    k = shape[-1]
    assert not packed.codes[..., w.format.packed_columns(k) :].any()
    assert not packed.scales[..., -(-k // w.format.block[1]) :].any()
    assert packed.groups == -(-k // 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.scale == "e8m0"])
def test_products_are_exact_within_the_exponent_range(layout: Any, name: str, dtype: torch.dtype) -> None:
    element = FORMATS[name].element
    least, greatest = layout.exponent_range(element, dtype)
    values = torch.tensor([v for v in element.values if abs(v) < float("inf")], dtype=torch.float64)

    def exact(byte: int) -> bool:
        product = values * 2.0 ** (byte - 127)
        return torch.equal(product.to(dtype).double(), product)

    assert all(exact(byte) for byte in range(least, greatest + 1))
    # The range may stop short of what the dtype holds only where the kernel's own multiplier leaves float32.
    assert not exact(greatest + 1) or greatest == 127 + element.bias
    assert least == 0 or not exact(least - 1) or element.name == "int8"


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.scale == "e8m0"])
def test_exponents_look_past_zero_blocks_and_nan_scales(layout: Any, name: str) -> None:
    w = random_bytes(name, (4, 96))
    w.scales.fill_(120)
    w.codes.fill_(0x55)
    assert layout.pack(w).exponents == (120, 120)
    w.scales[1, 2], w.scales[0, 0], w.scales[3, 1] = 0, 255, 130
    block = w.codes.shape[1] // 3
    w.codes[1, 2 * block :] = 0
    assert layout.pack(w).exponents == (120, 130)
    w.codes[1, 2 * block] = 1
    assert layout.pack(w).exponents == (0, 130)
    w.scales.fill_(255)
    assert layout.pack(w).exponents == (127, 127)


def run_on_device(interpreted: bool, selected: str = "test") -> str:
    """The last line that pytest prints."""
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selected]
    command += sorted(str(file) for file in here.glob("triton_*on_device.py"))
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
    return result.stdout.splitlines()[-1]


def interpreted(selected: str) -> str:
    """In a process of its own: Triton asks the environment once, when it is imported."""
    return run_on_device(True, selected)


PARTS = ("conformance and linear", "conformance and moe", "not conformance")


def ahead(item: pytest.Function) -> Iterator[tuple[Callable[[str], str], str]]:
    """What a test waits for."""
    if item.name == "test_kernels_in_the_interpreter" and find_spec("triton") is not None:
        yield from ((interpreted, part) for part in PARTS)


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    for part in PARTS:
        print(begun(interpreted, part).result())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm GPU")
def test_kernels_on_the_gpu() -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    print(run_on_device(interpreted=False))
