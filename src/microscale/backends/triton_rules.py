"""When the Triton kernels can run a problem. Apart from the kernels, which are imported only once they are chosen."""

from __future__ import annotations

from collections.abc import Collection

from microscale.accumulation import FLOAT32, Accumulation, of_fp8_codes
from microscale.backends.adapters.common_rules import capability, numbers
from microscale.formats import FORMATS, FP8_GROUP128
from microscale.machine import Machine
from microscale.oracle import Problem

# Versions of Triton with which Hopper's own kernels have run on a GPU; Gluon changes from version to version.
PROVEN = ("3.6.", "3.7.", "3.8.", "3.9.")

# Formats whose codes and scales Triton gives to block-scaled matrix units, each with each, but on sm_120 and sm_121
# those of one width: the others it widens to bf16. NVFP4 goes with itself, too.
BLOCKS = ("mxfp4", "mxfp8_e4m3", "mxfp8_e5m2")
# From which version on it makes such instructions for a GPU, as compiled with 3.6 to 3.9.
UNITS = {"sm_100": "3.6", "sm_103": "3.6", "sm_110": "3.7", "sm_120": "3.6", "sm_121": "3.8", "gfx950": "3.6"}


def refuse(problem: Problem) -> str | None:
    """None, or why not; that the package is missing last, so that installing it is never advised in vain."""
    if problem.device not in ("cuda", "rocm", "xpu"):
        return f"Triton compiles for CUDA, ROCm and XPU, not for {problem.device}"
    if problem.device == "cuda" and capability(problem.arch) < 75:
        return f"the kernels need sm_75 or newer, and this is {problem.arch or 'unknown'}"
    if problem.act != "a16" and (why := _refuse_act(problem)):
        return why
    if "triton" not in problem.packages:
        return "the package triton is not installed"
    return None


def refuse_pair(weight: str, act: str) -> str | None:
    """None, or why kernels without block-scaled units take no weights in one format and activations in another."""
    if act == FP8_GROUP128.name:
        return (
            None
            if weight == "fp8_block128"
            else f"activations in {act} are multiplied with block FP8 weights only"
        )
    if FORMATS[act].scale == "e8m0":
        return None
    return f"activations are multiplied as bf16 numbers or as FP8 codes, and those of {act} are neither"


def refuse_blocks(arch: str, weight: str, act: str, version: str = "") -> str | None:
    """None, or why no block-scaled matrix unit multiplies codes of two formats with their scales on a GPU.

    Args:
        version: of Triton; empty: the newest.
    """
    sm, least = capability(arch), UNITS.get(_unit(arch))
    if least is None:
        return f"Triton has no block-scaled product for {arch}"
    if version and numbers(version) < numbers(least):
        return f"block-scaled products for {arch} need Triton {least} or newer, and this is {version}"
    if weight == act == "nvfp4":
        return None if sm else f"{arch} has block-scaled units, but not for scales of {act}"
    if weight not in BLOCKS or act not in BLOCKS:
        return f"Triton's block-scaled product takes MXFP4 and MXFP8, or NVFP4 twice, not {weight} and {act}"
    widths = [FORMATS[name].element.bits for name in (weight, act)]
    if sm >= 120 and widths[0] != widths[1]:
        return f"on {arch} Triton's block-scaled product takes codes of one width, not {widths[0]} and {widths[1]} bits"
    return None


def _unit(arch: str) -> str:
    """What `UNITS` calls a GPU: "sm_100a" -> "sm_100"."""
    sm = capability(arch)
    return f"sm_{sm}" if sm else arch


def in_blocks(problem: Problem) -> bool:
    """Whether activations meet weights as codes and scales, in block-scaled units."""
    found = problem.version("triton")
    return problem.act != "a16" and refuse_blocks(problem.arch, problem.weight, problem.act, found) is None


def _refuse_act(problem: Problem) -> str | None:
    """None, or why this GPU does not multiply such activations here."""
    arch, sm = problem.arch or "unknown", capability(problem.arch)
    if in_blocks(problem):
        return None
    if problem.act == "nvfp4" and _unit(arch) in UNITS:
        return refuse_blocks(arch, problem.weight, problem.act, problem.version("triton"))
    if (why := refuse_pair(problem.weight, problem.act)) is not None or problem.act != FP8_GROUP128.name:
        return why
    if problem.device == "xpu":
        return "Triton widens FP8 codes on XPU before it multiplies them"
    if sm >= 89 or arch == "gfx950":
        return None
    least = "sm_89 or newer" if problem.device == "cuda" else "gfx950"
    return f"products of FP8 codes need {least}, and this is {arch}"


def yields(problem: Problem) -> str | None:
    """None, or why other packages' kernels are asked first."""
    if in_blocks(problem):
        return "its block-scaled products were compiled for such a GPU and have never run on one"
    arch, act, sm = problem.arch, problem.act, capability(problem.arch)
    if act == FP8_GROUP128.name:
        if problem.op != "linear" or problem.device != "cuda" or sm != 90:
            return None
        return "torch's product of FP8 codes took 0.33 to 1.08 times as long on an NVIDIA H200, for 1 to 8192 tokens"
    if (widens := _widens(problem)) is None:
        return None
    return (
        f"{widens}: {refuse_blocks(arch or problem.device, problem.weight, act, problem.version('triton'))}"
    )


def yields_with_triton(problem: Problem) -> str | None:
    """None, or why a kernel of another package that widens activations, too, is asked no sooner than Triton's."""
    return None if in_blocks(problem) else _widens(problem)


def _widens(problem: Problem) -> str | None:
    """None, or that MX activations become bf16 where units take codes, or may: whoever gives them codes comes first."""
    units = capability(problem.arch) >= 100 or problem.arch == "gfx950" or problem.device == "xpu"
    if not units or problem.act not in FORMATS or FORMATS[problem.act].scale != "e8m0":
        return None
    return f"it widens activations in {problem.act} to bf16"


def accumulation(problem: Problem) -> Accumulation:
    """FP8 products of Hopper and Ada are added up more coarsely than in float32."""
    codes = problem.act == FP8_GROUP128.name
    return of_fp8_codes(problem.device, capability(problem.arch)) if codes else FLOAT32


def refuse_steps(device: str, arch: str, packages: Collection[str]) -> str | None:
    """None, or why a generated token is no chain of kernels there: they are for where they ran for us, or nearly."""
    why = f"the model is on {device}" if device != "cuda" else None
    if why is None and "triton" not in packages:
        why = "the package triton is not installed"
    if why is None and capability(arch) < 80:
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
