"""When the Triton kernels can run a problem. Apart from the kernels, which are imported only once they are chosen."""

from __future__ import annotations

from microscale.oracle import Problem


def refuse(problem: Problem) -> str | None:
    """None, or why not; that the package is missing last, so that installing it is never advised in vain."""
    if problem.device not in ("cuda", "rocm", "xpu"):
        return f"Triton compiles for CUDA, ROCm and XPU, not for {problem.device}"
    if problem.device == "cuda" and _capability(problem.arch) < 75:
        return f"the kernels need sm_75 or newer, and this is {problem.arch or 'unknown'}"
    if problem.act != "a16":
        return f"activations quantised to {problem.act} are not implemented in Triton yet"
    if "triton" not in problem.packages:
        return "the package triton is not installed"
    return None


def _capability(arch: str) -> int:
    digits = arch.removeprefix("sm_").rstrip("af")
    return int(digits) if digits.isdigit() else 0
