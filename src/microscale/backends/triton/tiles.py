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

from microscale.backends.triton.fragments import Fragments
from microscale.backends.triton.layout import Packed
from microscale.formats import Format

HOPPER_SHARED = 227 << 10  # bytes that a program may use
# Triton's interpreter keeps bfloat16 as integers and multiplies those, so on CPUs it is given float32 instead.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Target:
    """What the choice of tiles needs to know of a GPU.

    Attributes:
        shared: bytes of scratchpad that one program may use.
        amd: compiled by Triton's AMD backend.
        matrix_unit: Triton 3.6 uses it: not before sm_80.
        hopper: wgmma is there, and Gluon to ask for it.
    """

    shared: int
    amd: bool = False
    matrix_unit: bool = True
    hopper: bool = False


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
        return {"num_warps": self.warps, "num_stages": self.stages} | fixed

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments of the kernels."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


@dataclass(frozen=True)
class Cut:
    """How Hopper's kernels cut a product into programs and steps. Decides the speed only: no sum depends on it.

    Attributes:
        block_m: tokens of a program, 8 to 256.
        tiles: of 64 rows in a program.
        chunks: of 64 columns in a step; 1 for activations of several parts, whose sums take turns by the step.
        warps: 4, or 8 and at least two tiles.
        stages: steps whose weights and tokens are in shared memory; at least 3.
        overlap: decode the next step while the matrix unit works.
        tail: experts' last tiles of at most half the tokens take the time of half the tokens; block_m at least 16.
        bulk: tokens are copied a tile at a time, by one thread. Experts' tokens are put in order for that. One part only.
    """

    block_m: int
    tiles: int
    chunks: int
    warps: int
    stages: int
    overlap: bool = False
    tail: bool = False
    bulk: int = 0

    def __str__(self) -> str:
        flags = ("o" if self.overlap else "") + ("h" if self.tail else "") + (f"b{self.bulk}" if self.bulk else "")
        return f"m{self.block_m}t{self.tiles}c{self.chunks}w{self.warps}s{self.stages}{flags}"

    def constants(self, w: Fragments) -> dict[str, Any]:
        """Compile-time arguments of the kernels."""
        steps = self.sizes(w)[2]
        return {
            "ELEMENT": w.format.element.name,
            "SCALE": w.format.scale,
            "EVEN": w.shape[-1] % (64 * self.chunks) == 0,
            "BLOCK_M": self.block_m,
            "T": self.tiles,
            "C": self.chunks,
            "STAGES": self.stages,
            "OVERLAP": self.overlap,
            "BULK": self.bulk,
            "ODD": steps % 2 == 1,
            "ROW_SCALE": w.row_scale is not None,
            "num_warps": self.warps,
        } | ({"maxnreg": 128} if self._twice(w.format) else {})

    def _twice(self, fmt: Format) -> bool:
        """Whether two programs fit a multiprocessor if the compiler is held to half of its registers each."""
        return self.bulk > 0 and self.warps == 8 and self.block_m * self.tiles == 256 and fmt.element.bits == 4

    def sizes(self, w: Fragments) -> tuple[int, int, int]:
        """Of the matrix: tiles, chunks, and the steps that these are cut into."""
        return w.tiles, w.chunks, -(-w.chunks // self.chunks)

    def shared(self, fmt: Format, parts: int) -> int:
        """Bytes of shared memory that the loop takes, for weights of a format and activations of `parts` parts."""
        scales = 0 if fmt.scale == "f32" else 4096 // fmt.block[1]
        if self.bulk:  # codes go straight to registers
            return self.stages * (self.chunks * 128 * self.block_m + 8)
        return self.stages * self.chunks * (
            self.tiles * (512 * fmt.element.bits + scales) + 128 * parts * self.block_m
        )

    def fitted(self, fmt: Format, parts: int) -> Cut:
        """For a format that it was not measured with: what fits, and for block FP8 a step a block."""
        cut = self
        if fmt.scale == "f32":
            # Sums of a step and of all steps: a thread's registers hold 64 of each.
            warps = 8 if self.block_m > 64 and self.tiles > 1 else self.warps
            cut = replace(self, chunks=2, warps=warps)
        while cut.shared(fmt, parts) > HOPPER_SHARED and cut.stages > 3:
            cut = replace(cut, stages=cut.stages - 1)
        return cut


# What one H200 was fastest with (torch 2.11, triton 3.6, MXFP4): gpt-oss-20b, -120b and Qwen3-30B-A3B, and matrices of
# 8192 x 8192 and 5120 x 2880, at 1 to 8192 tokens; see docs/benchmarks-gpu.md. Of the cuts that were timed only those
# are here whose numbers were checked on an H200 too.
# linear: tokens up to which a row holds, and the cut.
LINEAR: dict[str, tuple[tuple[float, Cut], ...]] = {
    "sm_90": (
        (8, Cut(8, 1, 4, 4, 4, True)),
        (32, Cut(32, 1, 2, 4, 6)),
        (64, Cut(64, 1, 1, 4, 6, True)),  # checked as the tail of 128 tokens
        (128, Cut(64, 2, 1, 4, 6, True)),
        (256, Cut(128, 2, 1, 8, 5, True)),
        (inf, Cut(256, 2, 1, 8, 4, True)),
    )
}
# MoE: routes up to which a row holds, in all and for each expert hit, rows of w13 from which, the cuts of w13 and w2.
MOE: dict[str, tuple[tuple[float, float, int, Cut, Cut], ...]] = {
    "sm_90": (
        (4, inf, 0, Cut(8, 2, 2, 4, 4), Cut(8, 1, 4, 4, 4, True)),
        (8, inf, 0, Cut(8, 2, 2, 4, 4, True), Cut(8, 1, 4, 4, 4, True)),
        (inf, 6, 0, Cut(8, 2, 2, 4, 4), Cut(8, 2, 2, 4, 4)),
        (inf, 12, 0, Cut(16, 2, 2, 4, 4), Cut(16, 2, 2, 4, 4)),
        (inf, 48, 0, Cut(32, 2, 1, 4, 6, True, True), Cut(32, 2, 1, 4, 6, True, True)),
        (inf, 96, 0, Cut(64, 2, 1, 4, 6, True, True), Cut(64, 2, 1, 4, 6, True, True)),
        (inf, 192, 0, Cut(128, 2, 1, 4, 5, True, True), Cut(128, 2, 1, 4, 5, True, True)),
        (inf, 512, 4096, Cut(128, 2, 1, 8, 5, True, True), Cut(128, 2, 1, 4, 5, True, True)),
        (inf, inf, 0, Cut(128, 2, 1, 4, 5, True, True), Cut(128, 2, 1, 4, 5, True, True)),
    )
}


def choose(w: Packed, dtype: torch.dtype, tokens: int, device: torch.device) -> Tiles:
    """Tiles for a product in which about `tokens` tokens meet each matrix."""
    chunk = w.constants(dtype)["CHUNK"]
    return sizes(w.format.element.bits, chunk, dtype.itemsize, tokens, target(device))


@cache
def sizes(bits: int, chunk: int, itemsize: int, tokens: int, target: Target) -> Tiles:
    """The choice itself, from numbers: bits of a code, columns of a dot, bytes of an activation, tokens, the GPU."""
    block_m = 16
    # Without a matrix unit products are unrolled: large tiles would spill, and take minutes to compile.
    unrolled = itemsize == 4 or not target.matrix_unit
    while block_m < min(tokens, 16 if unrolled else 128):
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


def linear_cut(fmt: Format, tokens: int, rows: int, parts: int, arch: str = "sm_90") -> Cut:
    """For `tokens` tokens and a matrix of `rows` rows; `parts`: of the activations, see `hopper`."""
    if parts > 1:
        cut = _in_parts(tokens)
    else:
        cut = next(cut for most, cut in LINEAR[arch] if tokens <= most)
    if fmt.scale == "f32":
        cut = replace(cut, block_m=min(cut.block_m, 128))
    return cut.fitted(fmt, parts)


def moe_cuts(
    fmts: tuple[Format, Format],
    tokens: int,
    top_k: int,
    experts: int,
    rows: int,
    parts: int,
    arch: str = "sm_90",
) -> tuple[Cut, Cut]:
    """For w13, with `rows` rows an expert, and w2; both have the same block_m and tail."""
    routes = tokens * top_k
    each = (
        routes / min(experts, routes) if tokens > 1 else 1
    )  # a single token's routes are tiles of their own
    if parts > 1:
        cut = _in_parts(each)
        return cut.fitted(fmts[0], parts), cut.fitted(fmts[1], parts)
    first, second = next(
        (a, b) for most, per, least, a, b in MOE[arch] if routes <= most and each <= per and rows >= least
    )
    return first.fitted(fmts[0], parts), second.fitted(fmts[1], parts)


def _in_parts(tokens: float) -> Cut:
    """Not measured: what shared memory takes three parts of."""
    return Cut(8 if tokens <= 8 else 16 if tokens <= 16 else 32 if tokens <= 32 else 64, 2, 1, 8, 4, True)


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
    hopper = capability == (9, 0) and triton.__version__.startswith("3.6.")
    return Target(int(properties["max_shared_mem"]), amd, capability >= (8, 0), hopper)
