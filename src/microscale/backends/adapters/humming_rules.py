"""When the package humming-kernels can run a problem."""

from __future__ import annotations

from microscale.backends.adapters.common_rules import capability, missing, not_as_bf16, sizes
from microscale.oracle import Problem

PACKAGE = "humming-kernels"
# Formats whose element and scale its kernels know. MXINT8's implied factor 2^-6 is not among its scales.
FORMATS = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4")


def refuse(problem: Problem) -> str | None:
    """None, or why not; that the package is missing last, so that installing it is never advised in vain."""
    if problem.device != "cuda":
        return f"humming's kernels are for CUDA, not for {problem.device}"
    if capability(problem.arch) < 80:
        return f"its bf16 kernels need sm_80 or newer, and this is {problem.arch or 'unknown'}"
    return operands(problem) or missing(problem, PACKAGE)


def operands(problem: Problem) -> str | None:
    """The part that asks for no machine: None, or why not."""
    why = not_as_bf16(problem)
    if why is not None:
        return why
    if problem.dtype != "bf16":
        return f"its weights are packed for bf16 activations, and these are {problem.dtype}"
    if problem.weight == "fp8_block128":
        return "with 16-bit activations it rounds the float32 scales of block FP8 to bf16"
    if problem.weight not in FORMATS:
        return f"humming has no kernel for weights in {problem.weight}"
    if problem.bias:
        return "it adds biases to results that are already rounded to bf16"
    return sizes(problem, 8, 32)
