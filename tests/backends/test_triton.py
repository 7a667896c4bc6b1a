"""The triton backend: its refusals, its layout, its kernels in the interpreter and on a GPU, and that they compile for
targets that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from microscale.activations import GPT_OSS
from microscale.backends.triton_rules import refuse
from microscale.formats import FORMATS
from microscale.invented import INVENTED
from microscale.machine import Gpu
from microscale.oracle import Problem
from microscale.quant import QuantTensor, dequantize

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


def random_bytes(name: str, shape: tuple[int, ...]) -> QuantTensor:
    """Any codes and any scales: a layout must not look at what they mean. What lies past K is 0."""
    fmt = FORMATS[name]
    codes = torch.randint(256, (*shape[:-1], fmt.packed_columns(shape[-1])), dtype=torch.uint8)
    spare = codes.shape[-1] * 8 - shape[-1] * fmt.element.bits
    codes[..., -1] &= 255 >> spare
    scales = torch.randint(256, (*shape[:-2], *fmt.scale_shape(*shape[-2:])), dtype=torch.uint8)
    outer = torch.rand(*shape[:-2], 1) if fmt.tensor_scale else None
    return QuantTensor(
        fmt, shape, codes, scales.float() if fmt.scale == "f32" else scales, outer, fmt.rules[0]
    )


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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here / "triton_on_device.py"]
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


# Kind, architecture, lanes of a warp, what machine code is called, bytes of shared memory.
TARGETS = {
    "sm_80": ("cuda", 80, 32, "cubin", 163 << 10),
    "sm_90": ("cuda", 90, 32, "cubin", 227 << 10),
    "sm_100": ("cuda", 100, 32, "cubin", 227 << 10),
    "gfx942": ("hip", "gfx942", 64, "hsaco", 64 << 10),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def compiled(
    kernel: Any, target: str, given: dict[str, Any], options: dict[str, Any], sixteens: tuple[str, ...] = ()
) -> Any:
    """Compile for a GPU that is not here.

    Args:
        given: by argument: a type word ("*bf16", "i32", "fp32") or a compile-time value.
        sixteens: integers that are multiples of 16.
    Returns:
        The stages of compilation, by name.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    words = ("*", "i32", "fp32")
    types = {
        n: v for n, v in given.items() if isinstance(v, str) and v.startswith(words) and n in kernel.arg_names
    }
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    constants = {n: given[n] for n in kernel.arg_names if n not in types}
    aligned = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]]
        for n, t in types.items()
        if t[0] == "*" or n in sixteens
    }
    kind, arch, warp, *_ = TARGETS[target]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget(kind, arch, warp), options=options).asm


def compile_ahead(kernel: Any, target: str, given: dict[str, Any], options: dict[str, Any]) -> int:
    """`compiled`: the bytes of machine code."""
    return len(compiled(kernel, target, given, options)[TARGETS[target][3]])


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
    given = dict.fromkeys(("routes", "experts", "known", "count", "N"), "i32")
    given |= dict.fromkeys(("keys", "order", "ends", "tile_experts", "tile_starts"), "*i32")
    given |= {
        "ids": "*i64",
        "expert_map": "*i64",
        "HAS_MAP": True,
        "BLOCK_M": 16,
        "BLOCK_E": 128,
        "BLOCK": 1024,
    }
    given |= {"y": "*bf16", "shares": "*fp32", "TOP_K": 4, "PDL": target == "sm_90"}
    assert compile_ahead(routing._route_kernel, target, given, {}) > 0
    assert compile_ahead(total._total_kernel, target, given, {}) > 0


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(1, 32), (65, 96), (130, 160), (2, 64, 64), (3, 200, 352)])
def test_unpack_is_the_exact_inverse_of_fragments(layout: Any, name: str, shape: tuple[int, ...]) -> None:
    fragments = import_module("microscale.backends.triton.fragments")
    w = random_bytes(name, shape)
    assert not fragments.suits(replace(w, scales=w.scales | 0xFF))
    w.scales.clamp_(max=128 if name == "mxfp4" else 126)
    assert fragments.suits(w)
    packed = fragments.pack(w)
    for back in (fragments.unpack(packed), layout.unpack(packed.plain)):
        assert (back.format, back.shape, back.rule) == (w.format, w.shape, w.rule)
        assert torch.equal(back.codes, w.codes)
        assert torch.equal(back.scales, w.scales)
        assert (back.tensor_scale is None) == (w.tensor_scale is None)


def test_fragments_are_for_bytes_that_the_layout_can_hold(layout: Any) -> None:
    fragments = import_module("microscale.backends.triton.fragments")
    assert not fragments.suits(random_bytes("mxfp8_e4m3", (64, 64)))
    w = random_bytes("mxfp4", (64, 48))
    w.scales.fill_(120)
    assert not fragments.suits(w)


def test_the_hopper_kernels_decode_what_fragments_holds(layout: Any) -> None:
    """The kernel's shifts and masks, bit for bit, on integers: every code comes out where wgmma wants it."""
    fragments = import_module("microscale.backends.triton.fragments")
    w = random_bytes("mxfp4", (128, 128))
    w.scales.fill_(127)
    words = fragments.pack(w).codes.view(2, 2, 4, 8, 4, 2, 2).long() & 0xFFFFFFFF

    def rotated(v: torch.Tensor, left: int) -> torch.Tensor:
        return (v << left | v >> 32 - left) & 0xFFFFFFFF

    zero, one = words.unbind(-1)
    rest = zero & 0x0C180C18 | one << 2 & 0xFFFFFFFF & ~0x0C180C18
    pairs = [
        zero,
        zero << 6,
        rotated(zero, 10),
        one,
        one << 6,
        rotated(one, 10),
        rest << 2,
        rotated(rest, 12),
    ]
    bits = torch.stack(pairs, -1) & 0x81C081C0
    halves = torch.stack((bits << 16, bits & 0xFFFF0000), -1) & 0xFFFFFFFF
    found = (halves - (halves >> 31 << 32)).int().view(torch.float32).double() * 2.0**126
    # tile, chunk, warp, g, t, p, (q, h, odd row), odd column -> rows, columns
    found = found.unflatten(-2, (2, 2, 2)).permute(0, 2, 3, 8, 1, 5, 6, 7, 4, 9).reshape(128, 128)
    assert torch.equal(found, dequantize(w, torch.float64))


@pytest.mark.parametrize("block_m, overlap", [(8, False), (128, True)])
@pytest.mark.parametrize("name, kind, interleaved", [("mxfp4", "swiglu_oai", True), ("nvfp4", "silu", False)])
def test_the_hopper_kernels_keep_weights_in_registers(
    layout: Any, name: str, kind: str, interleaved: bool, block_m: int, overlap: bool
) -> None:
    hopper, experts = (import_module(f"microscale.backends.triton.{n}") for n in ("hopper", "hopper_moe"))
    cut = hopper.Cut(block_m, 2, 2, 8, 4, overlap)
    w = random_bytes(name, (2, 128, 160))
    w.scales.fill_(120)
    packed = import_module("microscale.backends.triton.fragments").pack(w)
    constants = cut.constants(packed)
    given = constants | {
        **dict.fromkeys(("codes", "scales", "tile_experts", "tile_starts", "ends", "order"), "*i32"),
        **dict.fromkeys(("M", "N", "K", "WIDTH", "TILES", "CHUNKS", "STEPS", "top_k"), "i32"),
        **dict.fromkeys(("alpha", "beta", "limit"), "fp32"),
        **dict.fromkeys(("x", "y", "h", "bias"), "*bf16"),
        **dict.fromkeys(("shares", "topk_weights"), "*fp32"),
        "row_scale": "*fp32" if packed.row_scale is not None else None,
        "HAS_BIAS": True,
        "GROUP": 8,
        "KIND": kind,
        "GATED": True,
        "INTERLEAVED": interleaved,
        "HAS_LIMIT": interleaved,
        "WEIGHT_ON_INPUT": False,
        "PDL": True,
    }
    for kernel in (hopper._linear_kernel, experts._first_kernel, experts._second_kernel):
        ptx = compiled(kernel, "sm_90", given, {"num_warps": cut.warps}, ("K", "N", "WIDTH"))["ptx"]
        products = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (\S)", ptx)
        # A brace: the left operand is a list of registers.
        assert set(products) == {"{"}
