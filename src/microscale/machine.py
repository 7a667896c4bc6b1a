"""What this machine is: the only file that probes. Everything else takes a `Machine` as an argument."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch

from microscale.env import CPU_LEVELS

# What a `Problem` calls our own C++ core among its packages.
CORE = "microscale-core"

# Optional packages that a backend may build on, and the names they are installed under: PyTorch's builds of Triton
# for AMD and Intel have their own.
PACKAGES = {
    "triton": ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu"),
    "humming-kernels": ("humming-kernels",),
    "vllm-xpu-kernels": ("vllm-xpu-kernels",),
    "flashinfer-python": ("flashinfer-python",),
    "amd-aiter": ("amd-aiter",),
}

# What the command line calls some of them: the backends that need them.
SHORT = {
    "triton": "triton",
    "humming": "humming-kernels",
    "xpu_kernels": "vllm-xpu-kernels",
    "flashinfer": "flashinfer-python",
    "aiter": "amd-aiter",
}

# The version of each that was read: what "as if it were installed" means where it is not. Adapters to other packages
# refuse versions below it, and from the next minor one on (microscale.backends.adapters.common_rules).
READ = {
    "triton": "3.6.0",
    "humming-kernels": "0.1.19",
    "vllm-xpu-kernels": "0.1.16.2",
    "flashinfer-python": "0.7.2.post1",
    "amd-aiter": "0.1.7.post2.dev18",
}

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Attributes:
        kind: torch's device word: "cuda", "rocm", "xpu" or "mps".
        arch: "sm_90", "gfx942", "xe2"; empty where the kind has no such notion.
        memory: bytes.
    """

    kind: str
    arch: str
    name: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """The facts that a choice of kernel may depend on.

    Attributes:
        name: for people.
        cpu: model name.
        isa: instruction sets that can be used, spelt as Linux does: "avx2", "avx512f", "avx512_bf16", "amx_bf16".
        amx_permitted: the operating system lets this process use AMX tiles.
        cores: processors this process may use.
        memory: bytes of RAM.
        gpus: accelerators that torch sees.
        packages: (name, version) of the installed optional packages.
        torch: its version.
        compiler: path of a C++ compiler, or empty.
        core: the widest level that the C++ core was compiled for, or empty: it is not in this installation.
        core_missing: why it is not.
        assumed: names of `packages` that are not really there; see `with_packages`.
    """

    name: str
    cpu: str
    isa: frozenset[str]
    amx_permitted: bool
    cores: int
    memory: int
    gpus: tuple[Gpu, ...] = ()
    packages: tuple[tuple[str, str], ...] = ()
    torch: str = ""
    compiler: str = ""
    core: str = ""
    core_missing: str = ""
    assumed: frozenset[str] = frozenset()

    @property
    def device(self) -> str:
        """Kind of device that models run on by default: the first GPU's, else "cpu"."""
        return self.gpus[0].kind if self.gpus else "cpu"

    def with_packages(self, names: Iterable[str]) -> Machine:
        """The same machine as if these packages of `PACKAGES` were installed, in the versions that were read."""
        there = dict(self.packages)
        added = {name: READ[name] for name in names if name not in there}
        return replace(self, packages=tuple((there | added).items()), assumed=self.assumed | added.keys())

    @property
    def level(self) -> str:
        """The widest x86 level there is: "amx", "avx512_bf16", "avx512", "avx2", "neon" or "plain"."""
        if {"amx_tile", "amx_bf16"} <= self.isa and self.amx_permitted:
            return "amx"
        if "avx512_bf16" in self.isa:
            return "avx512_bf16"
        if {"avx512f", "avx512bw"} <= self.isa:
            return "avx512"
        if {"avx2", "fma"} <= self.isa:
            return "avx2"
        return "neon" if "neon" in self.isa else "plain"

    @property
    def core_level(self) -> str:
        """The widest level that the C++ core uses: this machine's, or the one that it was compiled or lowered to."""
        both = [level for level in (self.level, self.core) if level in CPU_LEVELS]
        return min(both, key=CPU_LEVELS.index) if len(both) == 2 else self.level


def lowered() -> Machine:
    """The machine this process runs on, and its core as MICROSCALE_CPU_LEVEL lowers it.

    Raises:
        SettingError: to no level, or to one that it does not have.
    """
    machine = detect()
    if not machine.core:
        return machine
    from microscale.backends import cpu_core

    return replace(machine, core=CPU_LEVELS[cpu_core.level()])


@cache
def detect() -> Machine:
    """The machine this process runs on. Cheap after the first call; never raises for what is merely absent."""
    flags, cpu = _cpu()
    core, core_missing = _core()
    return Machine(
        name="this machine",
        cpu=cpu,
        isa=flags,
        amx_permitted="amx_tile" in flags and _request_amx(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_memory(),
        gpus=_gpus(),
        packages=tuple((p, v) for p, names in PACKAGES.items() if (v := _version(names)) is not None),
        torch=torch.__version__,
        compiler=shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or "",
        core=core,
        core_missing=core_missing,
    )


def _core() -> tuple[str, str]:
    """(the level that the C++ core was compiled up to, "") or ("", why it cannot be used)."""
    try:
        import microscale._core as core
    except ModuleNotFoundError as error:
        if error.name != "microscale._core":
            raise
        return "", (
            "it could not be compiled when microscale was installed, which takes a C++20 compiler; "
            "`pip install --verbose` of the sources shows what failed"
        )
    except ImportError as error:
        return "", f"it is there, but cannot be loaded: {error}"
    return CPU_LEVELS[core.compiled_level()], ""


def _cpu() -> tuple[frozenset[str], str]:
    if sys.platform == "linux" and os.path.exists("/proc/cpuinfo"):
        fields: dict[str, str] = {}
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                fields.setdefault(key.strip(), value.strip())
        words = fields.get("flags") or fields.get("Features") or ""
        flags = {"neon" if word == "asimd" else word for word in words.split()}
        return frozenset(flags), fields.get("model name") or platform.machine()
    flags = {"neon"} if platform.machine() in ("arm64", "aarch64") else set()
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability.startswith("avx512"):
        flags |= {"avx2", "fma", "avx512f", "avx512bw"}
    elif capability.startswith("avx2"):
        flags |= {"avx2", "fma"}
    return frozenset(flags), platform.processor() or platform.machine()


def _request_amx() -> bool:
    """Ask Linux for the AMX tile registers: each process must, or its first tile instruction is a SIGILL."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


def _memory() -> int:
    if not hasattr(os, "sysconf"):
        return 0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(limit):
            with open(limit, encoding="ascii") as file:
                text = file.read().strip()
            if text.isdigit():
                total = min(total, int(text))
    return total


def cache_bytes() -> int:
    """Bytes of all last-level caches that this process's processors share; 0 where the system does not say."""
    found: dict[str, int] = {}
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        where = f"/sys/devices/system/cpu/cpu{cpu}/cache"
        levels = []
        for index in os.listdir(where) if os.path.isdir(where) else ():
            level, size, shared = (
                _line(f"{where}/{index}/{name}") for name in ("level", "size", "shared_cpu_list")
            )
            if level.isdigit() and size.endswith("K") and size[:-1].isdigit():
                levels.append((int(level), int(size[:-1]) * 1024, shared))
        if levels:
            _, found_size, by = max(levels)
            found[by] = found_size
    return sum(found.values())


def _line(path: str) -> str:
    if not os.path.isfile(path):
        return ""
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read().strip()


def _gpus() -> tuple[Gpu, ...]:
    found = []
    if torch.cuda.is_available():
        kind = "rocm" if torch.version.hip else "cuda"
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            arch = p.gcnArchName.split(":")[0] if kind == "rocm" else f"sm_{p.major}{p.minor}"
            found.append(Gpu(kind, arch, p.name, p.total_memory))
    elif hasattr(torch, "xpu") and torch.xpu.is_available():
        for i in range(torch.xpu.device_count()):
            properties = torch.xpu.get_device_properties(i)
            found.append(Gpu("xpu", "", properties.name, properties.total_memory))
    elif torch.backends.mps.is_available():
        found.append(Gpu("mps", "", "Apple GPU", _memory()))
    return tuple(found)


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
