"""When AMD's package amd-aiter can run a problem."""

from __future__ import annotations

from microscale.backends.adapters.common_rules import missing, sizes
from microscale.oracle import Problem

PACKAGE = "amd-aiter"
PAIRS = (("mxfp4", "mxfp4"), ("fp8_block128", "fp8_group128"))


def refuse(problem: Problem) -> str | None:
    """None, or why not; that the package is missing last, so that installing it is never advised in vain."""
    if problem.device != "rocm":
        return f"aiter's kernels are for AMD GPUs, not for {problem.device}"
    why = operands(problem)
    if why is not None:
        return why
    if problem.arch != "gfx950" and problem.weight == "mxfp4":
        return f"aiter's MXFP4 product is for gfx950, and this is {problem.arch or 'unknown'}"
    if problem.arch == "gfx942":
        return "the FP8 of gfx942 is E4M3FNUZ, which reads these codes as half their values"
    if problem.arch != "gfx950":
        return f"its block FP8 product of E4M3 codes was read for gfx950, and this is {problem.arch or 'unknown'}"
    return missing(problem, PACKAGE)


def operands(problem: Problem) -> str | None:
    """The part that asks for no machine: None, or why not."""
    if problem.act == "a16":
        return "this adapter has aiter's products of quantised activations, and they stay 16-bit here"
    if (problem.weight, problem.act) not in PAIRS:
        return f"this adapter has no product of weights in {problem.weight} and activations in {problem.act}"
    return sizes(problem, 16, 32 if problem.weight == "mxfp4" else 128)
