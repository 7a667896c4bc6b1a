"""When the Triton kernels can run a problem. Apart from the kernels, which are imported only once they are chosen."""

from __future__ import annotations

from collections.abc import Collection

from microscale.machine import Machine
from microscale.oracle import Problem

# Versions of Triton with which Hopper's own kernels have run on a GPU; Gluon changes from version to version.
PROVEN = ("3.6.", "3.7.", "3.8.", "3.9.")


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


def refuse_steps(device: str, arch: str, packages: Collection[str]) -> str | None:
    """None, or why a generated token is no chain of kernels there: they are for where they ran for us, or nearly."""
    why = f"the model is on {device}" if device != "cuda" else None
    if why is None and "triton" not in packages:
        why = "the package triton is not installed"
    if why is None and _capability(arch) < 80:
        why = f"this GPU is {arch}"
    return why and f"a token's kernels are Triton's, for CUDA from sm_80 on, and {why}"


def unproven(machine: Machine) -> str | None:
    """What a machine loses by its version of Triton, in a sentence."""
    version = dict(machine.packages).get("triton")
    if version is None or version.startswith(PROVEN) or all(gpu.arch != "sm_90" for gpu in machine.gpus):
        return None
    known = " to ".join(v.rstrip(".") for v in (PROVEN[0], PROVEN[-1]))
    return (
        f"Hopper's own kernels have run with Triton {known}; with {version} the slower ones of every GPU run"
    )


def uncompiled(machine: Machine) -> str | None:
    """What a Hopper GPU loses where CUDA C++ cannot be compiled, in a sentence."""
    packages = dict(machine.packages)
    hopper = any(gpu.arch == "sm_90" for gpu in machine.gpus)
    if not hopper or "triton" not in packages or unproven(machine) is not None:
        return None
    from microscale.backends.triton import nvrtc

    if (why := nvrtc.refuse()) is None:
        return None
    return f"{why}. For many tokens slower kernels run: pip install 'cuda-bindings>=13,<14' nvidia-cuda-nvrtc"


def _capability(arch: str) -> int:
    digits = arch.removeprefix("sm_").rstrip("af")
    return int(digits) if digits.isdigit() else 0
