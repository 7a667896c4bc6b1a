"""Triton kernels compiled for GPUs that are not here, and weights of random bytes; for the tests beside this file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from gpu_targets import POINTERS, TARGETS
from triton_ahead_step import STEP, step

from microscale.activations import GPT_OSS
from microscale.formats import FORMATS
from microscale.quant import QuantTensor


def compiled(
    kernel: Any, target: str, given: dict[str, Any], options: dict[str, Any], sixteens: tuple[str, ...] = ()
) -> Any:
    """Compile for a GPU that is not here.

    Args:
        given: by argument: a type word ("*bf16", "i32", "fp32") or a compile-time value.
        sixteens: integers that are multiples of 16.
    Returns:
        The compiled kernel: `asm` has the stages of compilation by name, `metadata.shared` bytes of shared memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    words = ("*", "i32", "fp32", "tensordesc")
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
    gpu = TARGETS[target]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, aligned)
    options = {"enable_fp_fusion": True} | options  # as `tiles.launch` has it
    return triton.compile(source, target=GPUTarget(gpu.kind, gpu.arch, gpu.lanes), options=options)


@dataclass(frozen=True)
class Made:
    """What was compiled, in values that a process can send.

    Attributes:
        code: bytes of machine code.
        shared: bytes of scratchpad.
        columns: of tensor memory.
        text: PTX or AMD's assembly.
        error: or what the compiler said instead.
    """

    code: int = 0
    shared: int = 0
    columns: int = 0
    text: str = ""
    error: str = ""


def made(target: str, compile: Callable[[], Any]) -> Made:
    """The result of a compilation, or its error: whatever a compiler raises is what a test has to show."""
    try:
        result = compile()
    except Exception as error:  # noqa: BLE001 (shown by the test that asked for it)
        return Made(error=f"{type(error).__name__}: {error}"[:2000])
    gpu = TARGETS[target]
    columns = getattr(result.metadata, "tmem_size", None) or 0
    return Made(len(result.asm[gpu.code]), result.metadata.shared, columns, result.asm[gpu.text])


# Kernels of every target by what they are called here: module, function.
KERNELS = {
    "linear": ("gemm", "_linear_kernel"),
    "w13": ("moe", "_first_kernel"),
    "w2": ("moe", "_second_kernel"),
    "route": ("routing", "_route_kernel"),
    "count": ("routing", "_count_kernel"),
    "place": ("routing", "_place_kernel"),
    "total": ("total", "_total_kernel"),
    "numbers": ("rounded", "_numbers_kernel"),
    "codes": ("rounded", "_codes_kernel"),
    "blocks": ("rounded", "_blocks_kernel"),
    "nvfp4": ("rounded", "_nvfp4_kernel"),
    "span": ("attend", "_span_kernel"),
    "masked_span": ("attend", "_span_kernel"),
    "ring_span": ("attend", "_span_kernel"),
    "token_span": ("attend", "_span_kernel"),
    "normed_span": ("attend", "_span_kernel"),
    "norm": ("small", "_rms_norm_kernel"),
    "add_norm": ("small", "_rms_norm_kernel"),
    "rows": ("rows", "_rows_kernel"),
    "pairs": ("rows", "_rows_kernel"),
    "row": ("rows", "_rows_kernel"),
    "choose": ("small", "_route_kernel"),
    "likeliest": ("likeliest", "_likeliest_kernel"),
    "router": ("router", "_router_kernel"),
    "gate": ("small", "_gate_kernel"),
}
PRODUCTS = ("linear", "w13", "w2")


@dataclass(frozen=True)
class Job:
    """One kernel to compile, for one target.

    Attributes:
        kernel: of `KERNELS`.
        format, tokens, bias: of a product: weights, how many tokens meet each matrix.
        dtype: activations, of a product or a kernel of `STEP`.
        in_tile: E8M0 scales go into the tile; else, as those of random bytes do, on the sums.
        codes: activations are FP8 codes, too.
        act: the format of activations whose codes meet those of weights in block-scaled units.
    """

    target: str
    kernel: str
    format: str = ""
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 16
    in_tile: bool = False
    bias: bool = True
    codes: bool = False
    act: str = ""

    def __str__(self) -> str:
        words = [
            self.target,
            self.kernel,
            self.format,
            str(self.dtype).removeprefix("torch."),
            f"M{self.tokens}",
        ]
        words += [
            w
            for w, on in (("in_tile", self.in_tile), ("no_bias", not self.bias), ("codes", self.codes))
            if on
        ]
        words += [self.act] if self.act else []
        if self.kernel in STEP:
            return f"{self.target}-{self.kernel}-{words[3]}"
        return "-".join(words if self.format else words[:2])


def run(job: Job) -> Made:
    """Compile one job."""
    module, function = KERNELS[job.kernel]
    kernel = getattr(import_module(f"microscale.backends.triton.{module}"), function)
    if job.format:
        given, options = product(job)
    elif job.kernel in STEP:
        given, options = step(job.kernel, job.target, job.dtype)
    else:
        given = routes(job.target) | rounding(job.kernel, job.target)
        options = {"num_warps": 1} if job.kernel in ("numbers", "codes", "blocks") else {}
    return made(job.target, lambda: compiled(kernel, job.target, given, options))


def product(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments, compiler's options) as the host code gives them."""
    blocks, layout, tiles = (
        import_module(f"microscale.backends.triton.{n}") for n in ("blocks", "layout", "tiles")
    )
    gpu, dtype = TARGETS[job.target], job.dtype
    unit = gpu.amd or (isinstance(gpu.arch, int) and gpu.arch >= 80)
    kind = tiles.Target(gpu.shared, gpu.amd, unit, tensor_memory=gpu.columns > 0)
    if job.act:
        w = random_bytes(job.format, (2, 128, 288))
        w.scales.clamp_(max=126)  # NVFP4's have no sign
        w = blocks.pack(w)
        return arguments(job, w, tiles.of_blocks(job.tokens, kind))
    w = layout.pack(random_bytes(job.format, (2, 128, 288)))
    if w.format.scale == "e8m0":
        inside = layout.exponent_range(w.format.element, dtype)
        w = replace(w, exponents=inside if job.in_tile else (0, 254))
    assert w.scale_in_tile(dtype) == (job.in_tile or w.format.scale == "e4m3"), job
    chunk = w.constants(dtype)["CHUNK"]
    tile = tiles.sizes(w.format.element.bits, chunk, dtype.itemsize, job.tokens, kind)
    if job.codes:
        tile = tiles.of_codes(job.tokens, kind)
    return arguments(job, w, tile)


def arguments(job: Job, w: Any, tile: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`product`'s for weights and tiles of any kind."""
    dtype = job.dtype
    stored = "*fp32" if job.codes else "*u8" if job.act else None
    given = {
        "codes": "*u8",
        **dict.fromkeys(("M", "N", "K", "scale_rows", "top_k"), "i32"),
        **dict.fromkeys(("tile_experts", "tile_starts", "ends", "order"), "*i32"),
        **dict.fromkeys(("alpha", "beta", "limit"), "fp32"),
        **dict.fromkeys(("x", "y", "h"), POINTERS[dtype]),
        **dict.fromkeys(("x_scales", "h_scales"), stored),
        **dict.fromkeys(("x_row_scale", "h_row_scale"), "*fp32" if job.act == "nvfp4" else None),
        **dict.fromkeys(("shares", "topk_weights"), "*fp32"),
        "bias": POINTERS[dtype] if job.bias else None,
        "HAS_BIAS": job.bias,
        "scales": "*fp32" if w.format.scale == "f32" else "*u8" if job.act else "*i32",
        "ACT": FORMATS[job.act].element.name if job.act else None,
        "row_scale": "*fp32" if w.row_scale is not None else None,
        "ROW_SCALE": w.row_scale is not None,
        "GROUPS": w.groups,
        "KIND": GPT_OSS.kind,
        "GATED": True,
        "INTERLEAVED": True,
        "HAS_LIMIT": True,
        "WEIGHT_ON_INPUT": False,
    }
    if stored:
        given |= {"w13": {"x": "*u8"}, "w2": {"h": "*u8"}, "linear": {"x": "*u8"}}[job.kernel]
    return w.constants(dtype) | tile.constants | given, tile.compiler


def rounding(kernel: str, target: str) -> dict[str, Any]:
    """Arguments of the kernels that store activations in a format, in E4M3, or E2M1 beside their scale bytes."""
    given: dict[str, Any] = {"x": "*bf16", "codes": "*u8", "scales": "*fp32", "K": "i32", "GROUPS": "i32"}
    if kernel == "blocks":
        four = {"BITS": 4, "MANTISSA": 1, "EMIN": 0, "EMAX": 2, "MAX": 6.0}
        return given | four | {"scales": "*u8", "WIDTH": 32, "COLUMNS": 512}
    if kernel == "nvfp4":
        return given | {"scales": "*u8", "row_scale": "*fp32", "STEPS": 6, "COLUMNS": 512}
    given |= {
        "MANTISSA": 3,
        "EMIN": -6,
        "EMAX": 8,
        "MAX": 448.0,
        "INTEGER": False,
        "COLUMNS": 512,
        "PDL": target == "sm_90",
        **dict.fromkeys(("scale_m", "scale_g"), "i32"),
    }
    return given | {"WIDTH": 128 if kernel == "codes" else 32, "CONVERTS": bool(TARGETS[target].codes)}


def routes(target: str) -> dict[str, Any]:
    """Arguments of the kernels that sort routes and add up shares."""
    given: dict[str, Any] = dict.fromkeys(("routes", "experts", "known", "count", "blocks", "N"), "i32")
    given |= dict.fromkeys(("order", "ends", "tile_experts", "tile_starts", "progress", "counts"), "*i32")
    given |= {"ids": "*i64", "expert_map": "*i64", "HAS_MAP": True, "y": "*bf16", "shares": "*fp32"}
    given |= {"BLOCK_M": 16, "BLOCK_E": 128, "BLOCK": 256, "TILES": 8, "TOP_K": 4}
    return given | {"PDL": target == "sm_90"}


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


def suitable_bytes(name: str, shape: tuple[int, ...]) -> Any:
    """Random bytes that Hopper's layout can hold: no infinities or NaNs, and scales in its range."""
    fragments = import_module("microscale.backends.triton.fragments")
    w = random_bytes(name, shape)
    element = w.format.element
    special = [c for c, v in enumerate(element.values) if abs(v) == float("inf") or v != v]
    if special:
        w.codes[torch.isin(w.codes, torch.tensor(special, dtype=torch.uint8))] = 1
    if w.format.scale == "e8m0":
        least, greatest = fragments.scale_bytes(element)
        w.scales.clamp_(min=least, max=greatest)
    elif w.format.scale == "e4m3":
        w.scales.clamp_(max=126)
    return w
