"""When the package vllm-xpu-kernels can run a problem."""

from __future__ import annotations

from microscale.backends.adapters.common_rules import missing, not_as_bf16, sizes
from microscale.backends.triton_rules import yields_with_triton
from microscale.oracle import Problem

PACKAGE = "vllm-xpu-kernels"
# (weights, activations) of oneDNN's products, and the least multiple of their block that K must be: a single block per
# row would be taken for a scale per row.
LINEAR = {
    ("mxfp4", "mxfp4"): 32,
    ("mxfp8_e4m3", "mxfp8_e4m3"): 64,
    ("mxfp8_e5m2", "mxfp8_e5m2"): 64,
    ("fp8_block128", "fp8_group128"): 256,
}
MOE = ("mxfp4", "mxfp8_e4m3", "mxfp8_e5m2")


def refuse(problem: Problem) -> str | None:
    """None, or why not; that the package is missing last, so that installing it is never advised in vain."""
    if problem.device != "xpu":
        return f"vllm-xpu-kernels are for Intel GPUs, not for {problem.device}"
    return operands(problem) or missing(problem, PACKAGE)


def yields(problem: Problem) -> str | None:
    """None, or why others are asked first: experts' activations are widened, as Triton widens them."""
    return yields_with_triton(problem) if problem.op == "moe" else None


def operands(problem: Problem) -> str | None:
    """The part that asks for no machine: None, or why not."""
    return _moe(problem) if problem.op == "moe" else _linear(problem)


def _linear(problem: Problem) -> str | None:
    least = LINEAR.get((problem.weight, problem.act))
    if problem.act == "a16" and problem.weight == "fp8_block128":
        return "oneDNN's product with 16-bit activations rounds the dequantised weights to 16 bits"
    if problem.act == "a16":
        return f"it has no product of weights in {problem.weight} and 16-bit activations"
    if least is None:
        return f"it has no product of weights in {problem.weight} and activations in {problem.act}"
    if problem.dtype == "fp32":
        return "its products give bf16 or fp16, and fp32 is asked for"
    if problem.k < least:
        return f"K must be at least {least}, and it is {problem.k}"
    blocks = problem.weight == "fp8_block128"
    return sizes(problem, 128 if blocks else 8, 128 if blocks else 32)


def _moe(problem: Problem) -> str | None:
    if problem.weight == "fp8_block128":
        return "its grouped product rounds block FP8 weights times their scales to bf16"
    if problem.weight not in MOE:
        return f"its grouped product has no weights in {problem.weight}"
    if problem.dtype != "bf16":
        return (
            f"its grouped product holds scales in the activations' range: bf16, and these are {problem.dtype}"
        )
    return not_as_bf16(problem) or sizes(problem, 8, 32)
