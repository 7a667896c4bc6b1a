"""Triton kernels compiled for GPUs that are not here, and weights of random bytes; for the tests beside this file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from microscale.activations import GPT_OSS
from microscale.formats import FORMATS
from microscale.quant import QuantTensor


@dataclass(frozen=True)
class Ahead:
    """A GPU to compile for.

    Attributes:
        kind, arch, lanes: as Triton's `GPUTarget` has them.
        shared: bytes of scratchpad that one program may use.
        product: the instructions, in PTX or AMD's assembly, that products in bfloat16 must become.
        columns: of tensor memory that one program may use.
        codes: the instructions that products of FP8 codes must become; empty where the backend refuses those.
        blocks: those that products of codes with their scales must become: MXFP4 twice, with MXFP8 on a side or on
            both, NVFP4 twice; empty where the backend refuses those.
    """

    kind: str
    arch: int | str
    lanes: int
    shared: int
    product: str
    columns: int = 0
    codes: str = ""
    blocks: tuple[str, str, str] = ("", "", "")

    @property
    def amd(self) -> bool:
        return self.kind == "hip"

    @property
    def code(self) -> str:
        """What Triton calls machine code."""
        return "hsaco" if self.amd else "cubin"

    @property
    def text(self) -> str:
        """What it calls the last stage that can be read."""
        return "amdgcn" if self.amd else "ptx"


TARGETS = {
    # No matrix unit: Triton's compiler has none for it, and multiplies number by number.
    "sm_75": Ahead("cuda", 75, 32, 64 << 10, r"\bfma\.rn\.f32"),
    "sm_80": Ahead("cuda", 80, 32, 163 << 10, r"\bmma\.sync\S*\.bf16"),
    "sm_89": Ahead("cuda", 89, 32, 99 << 10, r"\bmma\.sync\S*\.bf16", codes=r"\bmma\.sync\S*\.e4m3\.e4m3"),
    "sm_90": Ahead(
        "cuda", 90, 32, 227 << 10, r"\bwgmma\.mma_async\S*\.bf16", codes=r"\bwgmma\S*\.f32\.e4m3\.e4m3"
    ),
    "sm_100": Ahead(
        "cuda",
        100,
        32,
        227 << 10,
        r"\btcgen05\.mma\S*kind::f16",
        512,
        r"\btcgen05\.mma\S*kind::f8f6f4",
        (
            r"\btcgen05\.mma\S*kind::mxf4\.block_scale",
            r"\btcgen05\.mma\S*kind::mxf8f6f4\.block_scale",
            r"\btcgen05\.mma\S*kind::mxf4nvf4\.block_scale\.(scale_vec::4X|block16)",
        ),
    ),
    "sm_120": Ahead(
        "cuda",
        120,
        32,
        99 << 10,
        r"\bmma\.sync\S*\.bf16",
        codes=r"\bmma\.sync\S*\.e4m3\.e4m3",
        blocks=(
            r"\bmma\.sync\S*kind::mxf4nvf4\.block_scale\S*\.ue8m0",
            r"\bmma\.sync\S*kind::mxf8f6f4\.block_scale\S*\.ue8m0",
            r"\bmma\.sync\S*kind::mxf4nvf4\.block_scale\.scale_vec::4X\S*\.ue4m3",
        ),
    ),
    "gfx942": Ahead("hip", "gfx942", 64, 64 << 10, r"\bv_mfma_f32_\w*bf16"),
    "gfx950": Ahead(
        "hip",
        "gfx950",
        64,
        160 << 10,
        r"\bv_mfma_f32_\w*bf16",
        codes=r"\bv_mfma_f32_\w*(fp8_fp8|f8f6f4)",
        blocks=(r"\bv_mfma_scale_f32_16x16x128_f8f6f4", r"\bv_mfma_scale_f32_16x16x128_f8f6f4", ""),
    ),
    "gfx1100": Ahead("hip", "gfx1100", 32, 64 << 10, r"\bv_wmma_f32_\w*bf16"),
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
_REST = ("w1", "w2", "bias1", "bias2")  # what one matrix alone leaves out
# Those of a decoded token beside its products: what distinguishes each, and its warps.
STEP: dict[str, tuple[dict[str, Any], int]] = {
    "span": ({"MASKED": False, "RING": False, "TURN": False, "NORM": False}, 4),
    "masked_span": ({"MASKED": True, "RING": False, "TURN": False, "NORM": False}, 4),
    "ring_span": ({"MASKED": False, "RING": True, "TURN": False, "NORM": False, "LONG": False}, 4),
    "token_span": ({"MASKED": False, "RING": True, "TURN": True, "NORM": False, "LONG": False}, 4),
    "normed_span": (
        {"MASKED": False, "RING": True, "TURN": True, "NORM": True, "SINKS": False, "D": 128, "WIDTH": 128},
        8,
    ),
    "norm": ({"BLOCK": 4096, "SHARES": 0, "TWICE": False}, 8),
    "add_norm": ({"BLOCK": 4096, "SHARES": 4, "TWICE": True}, 8),
    "rows": ({"K": 2880, "M": 1, "COUNT": 3, "HELD": 8}, 4),
    "pairs": ({"K": 2880, "M": 1, "COUNT": 3, "HELD": 8, "GROUPS": 2}, 4),
    "row": (
        {"K": 288, "M": 4, "COUNT": 1, "HELD": 2, "BIAS1": False, "BIAS2": False} | dict.fromkeys(_REST),
        4,
    ),
    "router": ({"K": 2880, "ROWS": 4, "COLUMNS": 1024, "BIAS": True, "TWICE": False}, 4),
    "choose": ({"TOP_K": 4, "SLOTS": 4, "BLOCK": 128, "ALL": True}, 1),
    "likeliest": ({"BLOCK": 2048, "PARTS": 128}, 4),
    "gate": ({"BLOCK": 512}, 4),
}


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
        given, options = step(job)
    else:
        given, options = routes(job.target) | rounding(job.kernel, job.target), {}
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
        return given | four | {"scales": "*u8", "WIDTH": 32, "COLUMNS": 1024}
    if kernel == "nvfp4":
        return given | {"scales": "*u8", "row_scale": "*fp32", "STEPS": 3, "COLUMNS": 1024}
    given |= {
        "MANTISSA": 3,
        "EMIN": -6,
        "EMAX": 8,
        "MAX": 448.0,
        "INTEGER": False,
        "COLUMNS": 1024,
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


def step(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments, compiler's options) of a decoded token's other kernels, in gpt-oss' shapes."""
    flags, warps = STEP[job.kernel]
    own = POINTERS[job.dtype]
    given: dict[str, Any] = dict.fromkeys(
        (
            "y",
            "x",
            "w",
            "q",
            "k",
            "v",
            "mask",
            "sinks",
            "cos",
            "sin",
            "logits",
            "weights",
            "total",
            "more",
            "norm",
            "bias",
        ),
        own,
    )
    given |= dict.fromkeys(("new_k", "new_v", "q_weight", "k_weight", "gate", "up"), own)
    given |= dict.fromkeys(("w0", "w1", "w2", "bias0", "bias1", "bias2"), own)
    given |= dict.fromkeys(("sums", "peaks", "totals"), "*fp32") | {"arrived": "*i32"}
    given |= dict.fromkeys(("position", "ids"), "*i64") | dict.fromkeys(("scaling", "eps"), "fp32")
    strides = [f"{t}_{d}" for t in "kv" for d in "bhk"]
    counts = ["room", "key_heads", "heads", "keys", "N", "E", "q_b", "q_h", "mask_b", "mask_k"]
    counts += ["N0", "N1", "N2", "new_k_b", "new_v_b", "gate_m", "up_m"]
    given |= dict.fromkeys(strides + counts, "i32") | {"SIZE": 8 * job.dtype.itemsize}
    given |= {
        "D": 64,
        "WIDTH": 64,
        "SPANS": 32,
        "AHEAD": 4,
        "LONG": True,
        "HEADS": 8,
        "GROUP": 8,
        "ROWS": 16,
        "SINKS": True,
        "WARPS": 4,
        "GROUPS": 1,
        "COLUMNS": 256,
        **dict.fromkeys(("BIAS0", "BIAS1", "BIAS2"), True),
        "PDL": job.target == "sm_90",
    }
    given |= flags
    if job.kernel == "likeliest":
        given |= {"keys": "*i64", "V": "i32", "logits_b": "i32"}
    if "span" in job.kernel:
        attend = import_module("microscale.backends.triton.attend")
        sizes = attend.cut(given["WIDTH"], job.dtype.itemsize, TARGETS[job.target].shared)
        given["KEYS"], warps, given["STAGES"] = sizes
    return given, {"num_warps": warps}


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
