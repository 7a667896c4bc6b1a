"""When the package flashinfer-python can run a problem."""

from __future__ import annotations

from microscale.backends.adapters.common_rules import capability, missing, sizes
from microscale.oracle import Problem

PACKAGE = "flashinfer-python"
BLACKWELL = (100, 103, 107, 110, 120, 121)
# (weights, activations) -> where its product of them runs.
PAIRS = {
    ("mxfp8_e4m3", "mxfp8_e4m3"): BLACKWELL,
    ("mxfp4", "mxfp4"): BLACKWELL,
    ("nvfp4", "nvfp4"): (100, 103),  # a scale for each token is in one kernel alone
}
# Of experts, a grouped product too.
GROUPED = {("mxfp4", "mxfp8_e4m3"): BLACKWELL, ("mxfp4", "mxfp8_e5m2"): BLACKWELL}
_LEAST = 128  # below, its MXFP8 product may give NaN, says the package


def refuse(problem: Problem) -> str | None:
    """None, or why not; that the package is missing last, so that installing it is never advised in vain."""
    if problem.device != "cuda":
        return f"FlashInfer's kernels are for CUDA, not for {problem.device}"
    why = operands(problem)
    if why is not None:
        return why
    runs = _known(problem)[problem.weight, problem.act]
    if capability(problem.arch) not in runs:
        return f"it runs on {', '.join(f'sm_{n}' for n in runs)}, and this is {problem.arch or 'unknown'}"
    return missing(problem, PACKAGE)


def operands(problem: Problem) -> str | None:
    """The part that asks for no machine: None, or why not."""
    if problem.act == "a16":
        return "this adapter has FlashInfer's products of quantised activations, and they stay 16-bit here"
    pair = (problem.weight, problem.act)
    if pair not in _known(problem):
        return f"FlashInfer has no {_what(problem)} of weights in {pair[0]} and activations in {pair[1]}"
    if problem.bias:
        return "its products round to 16 bits before a bias could be added"
    if problem.dtype == "fp32" or (problem.op == "moe" and problem.dtype != "bf16"):
        wanted = "bf16" if problem.op == "moe" else "bf16 or fp16"
        return f"its products give {wanted} here, and {problem.dtype} is asked for"
    return _small(problem) or sizes(problem, 32 if problem.weight.startswith("mxfp8") else 8, 32)


def _known(problem: Problem) -> dict[tuple[str, str], tuple[int, ...]]:
    return PAIRS | GROUPED if problem.op == "moe" else PAIRS


def _what(problem: Problem) -> str:
    return "product" if problem.op == "linear" else "product for experts"


def _small(problem: Problem) -> str | None:
    if problem.weight != "mxfp8_e4m3":
        return None
    linear = [("N", problem.n), ("K", problem.k)]
    for name, size in linear if problem.op == "linear" else [("H", problem.k), ("I", problem.intermediate)]:
        if size < _LEAST:
            return f"{name} must be at least {_LEAST}, and it is {size}"
    return None
