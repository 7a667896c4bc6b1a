"""When torch's own block-scaled product can run a problem: both operands quantised, on hardware that scales blocks."""

from __future__ import annotations

from microscale.accumulation import Accumulation, of_fp8_codes
from microscale.backends.adapters.common_rules import capability, sizes
from microscale.oracle import Problem

# (weights, activations) -> what it is called in the refusals.
PAIRS = {
    ("fp8_block128", "fp8_group128"): "block FP8",
    ("mxfp8_e4m3", "mxfp8_e4m3"): "MXFP8",
    ("nvfp4", "nvfp4"): "NVFP4",
    ("mxfp4", "mxfp4"): "MXFP4",
}


def refuse(problem: Problem) -> str | None:
    """None, or why not."""
    if problem.device not in ("cuda", "xpu"):
        return _elsewhere(problem)
    return operands(problem) or _arch(problem)


def operands(problem: Problem) -> str | None:
    """The part that asks for nothing but the kind of device: None, or why not."""
    if problem.act == "a16":
        return "torch multiplies block-scaled numbers with each other, and activations stay 16-bit here"
    name = PAIRS.get((problem.weight, problem.act))
    if name is None:
        return f"torch has no product of weights in {problem.weight} and activations in {problem.act}"
    if problem.device == "xpu":
        if name not in ("block FP8", "NVFP4"):
            return f"torch has no {name} product for XPU in the versions that were read"
        return sizes(problem, 128 if name == "block FP8" else 16, 128 if name == "block FP8" else 32)
    if name == "MXFP4" and problem.bias:
        return "torch's MXFP4 product rounds to bf16 before a bias could be added"
    if name == "MXFP4" and problem.dtype != "bf16":
        return f"torch's MXFP4 product gives bf16, and {problem.dtype} is asked for"
    return sizes(problem, 16, 128 if name == "block FP8" else 32)


def accumulation(problem: Problem) -> Accumulation:
    """FP8 products of Hopper and Ada are added up more coarsely than in float32."""
    return of_fp8_codes(problem.device, capability(problem.arch))


def _arch(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return None
    name, sm = PAIRS[problem.weight, problem.act], capability(problem.arch)
    arch = problem.arch or "unknown"
    if name == "block FP8" and sm != 90:
        return f"torch's block FP8 product is for sm_90 alone, and this is {arch}"
    if name == "MXFP4" and sm // 10 != 10:
        return f"torch's MXFP4 product is for sm_100 and sm_103, and this is {arch}"
    if name in ("MXFP8", "NVFP4") and sm < 100:
        return f"torch's {name} product needs sm_100 or newer, and this is {arch}"
    return None


def _elsewhere(problem: Problem) -> str:
    if problem.device == "rocm":
        return "torch's scale layouts on ROCm depend on the ROCm version that it was built with"
    return f"torch scales blocks on CUDA and XPU, not on {problem.device}"
