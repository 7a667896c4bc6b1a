"""What each backend multiplies, in words for `explain`: stored codes, decoded numbers, or float32 ones.

One word comes first: native, decoded or emulated; see `oracle.Backend`.
"""

from __future__ import annotations

from microscale.backends.adapters.common_rules import capability
from microscale.backends.triton_rules import PROVEN, in_blocks
from microscale.formats import FP8_GROUP128, get_format
from microscale.machine import CORE
from microscale.oracle import Problem


def cpu(problem: Problem) -> str:
    """The C++ core's, by level."""
    level, act = problem.version(CORE), problem.act
    short = problem.dtype == "bf16" and (act == "a16" or get_format(act).scale != "f32")
    if short and level == "amx":
        return "decoded: weights become bf16 in registers, and AMX tiles multiply them"
    if short and level == "avx512_bf16":
        return "decoded: weights become bf16 in registers, and AVX-512-BF16 multiplies them"
    return "decoded: weights become float32 in registers, and so do activations"


def triton(problem: Problem) -> str:
    """The Triton kernels', by GPU."""
    sm = capability(problem.arch)
    if problem.act == FP8_GROUP128.name:
        return "native: FP8 matrix units multiply the codes of weights and activations, 128 columns at a time"
    if in_blocks(problem):
        return "native: block-scaled matrix units multiply the codes of weights and activations with their scales"
    if problem.device == "cuda" and sm < 80:
        return (
            "decoded: weights become numbers in registers; no matrix unit, since Triton uses none below sm_80"
        )
    number = "bf16" if problem.act != "a16" else problem.dtype
    if sm == 90 and not problem.version("triton").startswith(PROVEN):
        found = problem.version("triton") or "unknown"
        return (
            f"decoded: weights become {number} in registers, by the kernels for every GPU: those for Hopper "
            f"need Triton {PROVEN[0]}x to {PROVEN[-1]}x, and {found} is installed"
        )
    if sm != 90 and number == "fp32":
        return "decoded: weights become float32 in registers"
    number = "bf16" if sm == 90 else number
    return f"decoded: weights become {number} in registers, and the {number} matrix unit multiplies them"


def torch_scaled(problem: Problem) -> str:
    """torch's, by vendor."""
    if problem.device == "xpu":
        return "native where the GPU has a unit for the format; elsewhere (Xe2: FP8 and FP4) oneDNN decodes first"
    return f"native: FP{_bits(problem)} tensor cores multiply the codes of weights and activations"


def xpu_kernels(problem: Problem) -> str:
    """vllm-xpu-kernels'."""
    if problem.op == "moe":
        return "decoded: weights become bf16 in registers, and the bf16 matrix unit multiplies them"
    return torch_scaled(problem)


def flashinfer(problem: Problem) -> str:
    """FlashInfer's."""
    return "native: block-scaled tensor cores multiply the codes of weights and activations"


def aiter(problem: Problem) -> str:
    """aiter's."""
    return f"native: FP{_bits(problem)} matrix cores multiply the codes of weights and activations"


def humming(problem: Problem) -> str:
    """humming's."""
    return "decoded: weights become bf16 in registers, and the bf16 matrix unit multiplies them"


def emulation(problem: Problem) -> str:
    """Emulation's."""
    return "emulated: weights become float32, a tile at a time, and PyTorch multiplies them"


def _bits(problem: Problem) -> int:
    return 4 if problem.act in ("mxfp4", "nvfp4") else 8
