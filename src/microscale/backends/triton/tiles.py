"""How a product is cut into programs: one function from the problem to numbers, and what the launch needs besides."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from typing import Any

import torch
import triton
from torch import Tensor

from microscale.backends.triton.blocks import Blocks
from microscale.backends.triton.layout import Packed
from microscale.backends.triton_rules import PROVEN, refuse_blocks
from microscale.formats import Format

# Triton's interpreter keeps bfloat16 as integers and multiplies those, so on CPUs it is given float32 instead.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


_OF_CODES = ((16, (16, 64, 4)), (32, (32, 64, 5)), (64, (64, 128, 3)), (inf, (128, 64, 3)))


@dataclass(frozen=True)
class Target:
    """What the choice of tiles needs to know of a GPU.

    Attributes:
        shared: bytes of scratchpad that one program may use.
        amd: compiled by Triton's AMD backend.
        matrix_unit: Triton 3.6 uses it: not before sm_80.
        hopper: wgmma is there, and Gluon to ask for it.
        early: a kernel may start while the one ahead of it ends (asked for where that has run: sm_90).
        units: multiprocessors; 0 where nothing can be asked.
        tensor_memory: sums are kept in 512 columns of memory beside the matrix unit (sm_100 to sm_110).
        arch: as `machine.Gpu` has it; empty where nothing can be asked.
    """

    shared: int
    amd: bool = False
    matrix_unit: bool = True
    hopper: bool = False
    early: bool = False
    units: int = 0
    tensor_memory: bool = False
    arch: str = ""

    def multiplies(self, weight: Format, act: Format | None) -> bool:
        """Whether its matrix units multiply codes of two formats with their scales."""
        return act is not None and refuse_blocks(self.arch, weight.name, act.name, triton.__version__) is None


@dataclass(frozen=True)
class Tiles:
    """One program's share.

    Attributes:
        block_m: tokens. Decides the speed only: no sum depends on it.
        block_n: rows of W, at least 64: what one Hopper matrix instruction takes, so that all M take the same one.
        warps, stages: threads / 32, and K steps in flight.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    amd: bool = False

    def with_block_m(self, block_m: int) -> Tiles:
        """The same with fewer tokens: two products that share one list of tiles take the smaller."""
        return replace(self, block_m=block_m)

    @property
    def compiler(self) -> dict[str, int]:
        """Options of the compiler."""
        # AMD: the 16 x 16 instruction for every tile, since the 32 x 32 one walks K in another order.
        fixed = {"matrix_instr_nonkdim": 16} if self.amd else {}
        return {"num_warps": self.warps, "num_stages": self.stages} | fixed | launch(early=False)

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments of the kernels."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


def choose(
    w: Packed | Blocks, dtype: torch.dtype, tokens: int, device: torch.device, codes: bool = False
) -> Tiles:
    """Tiles for a product in which about `tokens` tokens meet each matrix. `codes`: of FP8 with each other."""
    if isinstance(w, Blocks):
        return of_blocks(tokens, target(device))
    if codes:
        return of_codes(tokens, target(device))
    chunk = w.constants(dtype)["CHUNK"]
    return sizes(w.format.element.bits, chunk, dtype.itemsize, tokens, target(device))


@cache
def sizes(bits: int, chunk: int, itemsize: int, tokens: int, target: Target) -> Tiles:
    """The choice itself, from numbers: bits of a code, columns of a dot, bytes of an activation, tokens, the GPU."""
    block_m = 16
    # Without a matrix unit products are unrolled: large tiles would spill, and take minutes to compile.
    unrolled = itemsize == 4 or not target.matrix_unit
    # Sums of 128 tokens, a part in decoding and scales need more tensor memory than there is.
    while block_m < min(tokens, 16 if unrolled else 64 if target.tensor_memory else 128):
        block_m *= 2
    # Small tiles while weights are what is waited for: more programs, and more of them beside each other.
    block_n = 64 if block_m <= 32 or unrolled or chunk == 128 else 128
    codes = block_n * chunk * (3 if bits == 6 else 1)
    x = chunk * block_m * itemsize * (2 if bits == 4 else 4 if bits == 6 else 1)
    stages = 2 if target.amd else 4  # Triton's AMD pipeliner fails on deeper loops of this kind (3.6)
    # A buffer more than stages - 1, for scales and for what layout conversions need.
    while stages > 1 and stages * (codes + x) > target.shared:
        stages -= 1
    return Tiles(block_m, block_n, block_n // 16, stages, target.amd)


@cache
def of_codes(tokens: int, target: Target) -> Tiles:
    """Of FP8 codes that are multiplied as they are, 128 columns at a time: the fastest of 13 on an H200.

    Few numbers a thread, since it has the matrix unit's sum besides the one in float32.
    """
    block_m, block_n, stages = next(t for m, t in _OF_CODES if tokens <= m)
    stages = 2 if target.amd else stages
    while stages > 1 and stages * 128 * (block_m + block_n) > target.shared:
        stages -= 1
    return Tiles(block_m, block_n, 4, stages, target.amd)


@cache
def of_blocks(tokens: int, target: Target) -> Tiles:
    """Of codes that block-scaled units multiply with their scales, 128 columns at a time: of 128 rows, since with fewer
    Triton widens codes instead of giving them to the units of sm_100."""
    block_m = 16
    while block_m < min(tokens, 128):
        block_m *= 2
    stages = 2 if target.amd else 4
    # A column of scales, too; and 4-bit codes beside 8-bit ones take a byte each.
    while stages > 1 and stages * (128 + 4) * (block_m + 128) > target.shared:
        stages -= 1
    return Tiles(block_m, 128, 8 if block_m == 128 else 4, stages, target.amd)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it this one."""
    if device.type == "cpu":
        return nullcontext()
    manager: AbstractContextManager[Any] = getattr(torch, device.type).device(device)
    return manager


def as_stored(x: Tensor) -> Tensor:
    """x as the kernels can read it: contiguous, and float32 for bfloat16 in the interpreter."""
    return x.to(stored_dtype(x.dtype)).contiguous()


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What activations of a dtype are kept in between kernels."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


@cache
def target(device: torch.device) -> Target:
    """What a device offers; 64 KiB where nothing can be asked."""
    if INTERPRETED or device.type == "cpu":
        return Target(1 << 16)
    with on(device):
        driver = triton.runtime.driver.active
        properties = driver.utils.get_device_properties(driver.get_current_device())
        amd = device.type == "cuda" and torch.version.hip is not None
        nvidia = device.type == "cuda" and not amd
        capability = torch.cuda.get_device_capability(device) if nvidia else (8, 0)
    hopper = capability == (9, 0) and triton.__version__.startswith(PROVEN)
    beside = nvidia and capability[0] in (10, 11)
    units = torch.cuda.get_device_properties(device).multi_processor_count if nvidia else 0
    early = nvidia and capability == (9, 0)
    arch = f"sm_{capability[0]}{capability[1]}" if nvidia else ""
    if amd:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    shared = int(properties["max_shared_mem"])
    return Target(shared, amd, capability >= (8, 0), hopper, early, units, beside, arch)


def launch(early: bool, fused: bool = True) -> dict[str, bool]:
    """Options of a launch.

    Args:
        early: it may start before the kernel ahead ends, for a kernel that waits by itself.
        fused: products and sums are one instruction where they can be. Said at every launch, since the default is
            another one from Triton 3.10 on, with which results would have other bits.
    """
    return {"enable_fp_fusion": fused} | ({"launch_pdl": True} if early else {})
