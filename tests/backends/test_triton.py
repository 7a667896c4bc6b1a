"""The triton backend: its refusals, its layout, its kernels in the interpreter and on a GPU, and that they compile for
targets that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_ahead import POINTERS, TARGETS, compile_ahead, random_bytes

from microscale.activations import GPT_OSS
from microscale.backends.triton_rules import refuse
from microscale.formats import FORMATS
from microscale.invented import INVENTED
from microscale.machine import Gpu
from microscale.oracle import Problem

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
    assert why == "activations quantised to nvfp4 are not implemented in Triton yet"
    assert refuse(LINEAR.on(INVENTED["mi300x"])) is None


@pytest.fixture
def layout() -> Any:
    pytest.importorskip("triton", reason="triton is not installed")
    from microscale.backends.triton import layout

    return layout


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 31), (33, 97), (129, 128), (5, 259), (3, 7, 65), (2, 130, 300)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_unpack_is_the_exact_inverse_of_pack(layout: Any, name: str, shape: tuple[int, ...]) -> None:
    w = random_bytes(name, shape)
    back = layout.unpack(layout.pack(w))
    assert (back.format, back.shape, back.rule) == (w.format, w.shape, w.rule)
    assert torch.equal(back.codes, w.codes)
    assert torch.equal(back.scales, w.scales)
    assert (w.tensor_scale is None) == (back.tensor_scale is None)
    if w.tensor_scale is not None:
        assert torch.equal(back.tensor_scale, w.tensor_scale)


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


def run_on_device(interpreted: bool) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [here / "triton_on_device.py", here / "triton_step_on_device.py"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]


def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton asks the environment once, when it is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    run_on_device(interpreted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm GPU")
def test_kernels_on_the_gpu() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run_on_device(interpreted=False)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name, dtype, tokens",
    [
        ("mxfp4", torch.bfloat16, 1),
        ("mxfp4", torch.bfloat16, 512),
        ("mxfp4", torch.float32, 512),
        ("nvfp4", torch.float16, 16),
        ("mxfp6_e3m2", torch.bfloat16, 40),
        ("mxfp8_e5m2", torch.float16, 16),
        ("mxint8", torch.bfloat16, 16),
        ("fp8_block128", torch.bfloat16, 300),
    ],
    ids=str,
)
def test_kernels_compile_for_gpus_that_are_not_here(
    layout: Any, target: str, name: str, dtype: torch.dtype, tokens: int
) -> None:
    gemm, moe, tiles = (import_module(f"microscale.backends.triton.{n}") for n in ("gemm", "moe", "tiles"))
    w = layout.pack(random_bytes(name, (2, 128, 288)))
    if name in ("mxfp4", "mxint8"):
        w = replace(w, exponents=(110, 120))  # the scales go into the tile; random ones go on the sums
    kind = tiles.Target(TARGETS[target][4], TARGETS[target][0] == "hip")
    tile = tiles.sizes(w.format.element.bits, w.constants(dtype)["CHUNK"], dtype.itemsize, tokens, kind)
    optional = "*fp32" if w.row_scale is not None else None
    common = (
        w.constants(dtype)
        | tile.constants
        | {
            **dict.fromkeys(("codes",), "*u8"),
            **dict.fromkeys(("M", "N", "K", "scale_rows", "top_k"), "i32"),
            **dict.fromkeys(("tile_experts", "tile_starts", "ends", "order"), "*i32"),
            **dict.fromkeys(("alpha", "beta", "limit"), "fp32"),
            **dict.fromkeys(("x", "y", "h", "bias"), POINTERS[dtype]),
            **dict.fromkeys(("shares", "topk_weights"), "*fp32"),
            "scales": "*fp32" if w.format.scale == "f32" else "*i32",
            "row_scale": optional,
            "ROW_SCALE": optional is not None,
            "HAS_BIAS": True,
            "GROUPS": w.groups,
            "KIND": GPT_OSS.kind,
            "GATED": True,
            "INTERLEAVED": True,
            "HAS_LIMIT": True,
            "WEIGHT_ON_INPUT": False,
        }
    )
    kernels = [gemm._linear_kernel]
    if tokens in (1, 300):
        kernels += [moe._first_kernel, moe._second_kernel]
    for kernel in kernels:
        assert compile_ahead(kernel, target, common, tile.compiler) > 0


@pytest.mark.parametrize("target", TARGETS)
def test_routing_and_sums_compile(layout: Any, target: str) -> None:
    routing, total = (import_module(f"microscale.backends.triton.{n}") for n in ("routing", "total"))
    given = dict.fromkeys(("routes", "experts", "known", "count", "blocks", "N"), "i32")
    given |= dict.fromkeys(("order", "ends", "tile_experts", "tile_starts", "counts"), "*i32")
    given |= {
        "ids": "*i64",
        "expert_map": "*i64",
        "HAS_MAP": True,
        "BLOCK_M": 16,
        "BLOCK_E": 128,
        "BLOCK": 256,
        "TILES": 8,
    }
    given |= {"y": "*bf16", "shares": "*fp32", "TOP_K": 4, "PDL": target == "sm_90"}
    for kernel in (routing._route_kernel, routing._count_kernel, routing._place_kernel, total._total_kernel):
        assert compile_ahead(kernel, target, given, {}) > 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", POINTERS, ids=str)
def test_kernels_of_a_step_compile_for_gpus_that_are_not_here(target: str, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    attend, small = (import_module(f"microscale.backends.triton.{n}") for n in ("attend", "small"))
    given: dict[str, Any] = {
        **dict.fromkeys(("y", "x", "w", "q", "k", "v", "mask", "sinks", "cos", "sin"), POINTERS[dtype]),
        **dict.fromkeys(("logits", "weights", "values"), POINTERS[dtype]),
        **dict.fromkeys(("sums", "peaks", "totals"), "*fp32"),
        **dict.fromkeys(("position", "slot", "ids"), "*i64"),
        **dict.fromkeys(("scaling", "eps"), "fp32"),
        "D": 64,
        "WIDTH": 64,
        "ROUND": 64,
        "KEYS": 64,
        "STEPS": 2,
        "GROUP": 8,
        "ROWS": 16,
        "HEADS": 64,
        "HALF": 32,
    }
    strides = [f"{t}_{d}" for t in ("k", "v", "keys", "values") for d in "bhk"]
    integers = (
        "keys",
        "spans",
        "key_heads",
        "heads",
        "N",
        "E",
        "q_b",
        "q_h",
        "mask_b",
        "mask_k",
        "turns_b",
        *strides,
    )
    given |= dict.fromkeys(integers, "i32")
    for masked, ring in ((False, False), (True, False), (False, True)):
        flags = {"MASKED": masked, "RING": ring, "ONE": not ring}
        assert compile_ahead(attend._span_kernel, target, given | flags, {"num_warps": 4}) > 0
    assert compile_ahead(attend._together_kernel, target, given, {}) > 0
    assert compile_ahead(small._rms_norm_kernel, target, given | {"BLOCK": 4096}, {"num_warps": 8}) > 0
    turn = given | {"keys": POINTERS[dtype], "BLOCK": 32}
    assert compile_ahead(small._turn_kernel, target, turn, {"num_warps": 1}) > 0
    routes = given | {"TOP_K": 4, "SLOTS": 4, "BLOCK": 128}
    assert compile_ahead(small._route_kernel, target, routes, {"num_warps": 1}) > 0
