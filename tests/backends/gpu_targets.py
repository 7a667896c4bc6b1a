"""GPUs that are not here, to compile for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ahead:
    """A GPU to compile for.

    Attributes:
        kind, arch, lanes: as Triton's `GPUTarget` has them.
        shared: bytes of scratchpad that one program may use.
        product: the instructions, in PTX or AMD's assembly, that products in bfloat16 must become.
        columns: of tensor memory that one program may use.
        codes: the instructions that products of FP8 codes must become; empty where the backend refuses those.
        blocks: those that products of codes with their scales must become: MXFP4 twice, with MXFP8 on a side or on
            both, NVFP4 twice; empty where the backend refuses those.
    """

    kind: str
    arch: int | str
    lanes: int
    shared: int
    product: str
    columns: int = 0
    codes: str = ""
    blocks: tuple[str, str, str] = ("", "", "")

    @property
    def amd(self) -> bool:
        return self.kind == "hip"

    @property
    def code(self) -> str:
        """What Triton calls machine code."""
        return "hsaco" if self.amd else "cubin"

    @property
    def text(self) -> str:
        """What it calls the last stage that can be read."""
        return "amdgcn" if self.amd else "ptx"


TARGETS = {
    # No matrix unit: Triton's compiler has none for it, and multiplies number by number.
    "sm_75": Ahead("cuda", 75, 32, 64 << 10, r"\bfma\.rn\.f32"),
    "sm_80": Ahead("cuda", 80, 32, 163 << 10, r"\bmma\.sync\S*\.bf16"),
    "sm_89": Ahead("cuda", 89, 32, 99 << 10, r"\bmma\.sync\S*\.bf16", codes=r"\bmma\.sync\S*\.e4m3\.e4m3"),
    "sm_90": Ahead(
        "cuda", 90, 32, 227 << 10, r"\bwgmma\.mma_async\S*\.bf16", codes=r"\bwgmma\S*\.f32\.e4m3\.e4m3"
    ),
    "sm_100": Ahead(
        "cuda",
        100,
        32,
        227 << 10,
        r"\btcgen05\.mma\S*kind::f16",
        512,
        r"\btcgen05\.mma\S*kind::f8f6f4",
        (
            r"\btcgen05\.mma\S*kind::mxf4\.block_scale",
            r"\btcgen05\.mma\S*kind::mxf8f6f4\.block_scale",
            r"\btcgen05\.mma\S*kind::mxf4nvf4\.block_scale\.(scale_vec::4X|block16)",
        ),
    ),
    "sm_120": Ahead(
        "cuda",
        120,
        32,
        99 << 10,
        r"\bmma\.sync\S*\.bf16",
        codes=r"\bmma\.sync\S*\.e4m3\.e4m3",
        blocks=(
            r"\bmma\.sync\S*kind::mxf4nvf4\.block_scale\S*\.ue8m0",
            r"\bmma\.sync\S*kind::mxf8f6f4\.block_scale\S*\.ue8m0",
            r"\bmma\.sync\S*kind::mxf4nvf4\.block_scale\.scale_vec::4X\S*\.ue4m3",
        ),
    ),
    "gfx942": Ahead("hip", "gfx942", 64, 64 << 10, r"\bv_mfma_f32_\w*bf16"),
    "gfx950": Ahead(
        "hip",
        "gfx950",
        64,
        160 << 10,
        r"\bv_mfma_f32_\w*bf16",
        codes=r"\bv_mfma_f32_\w*(fp8_fp8|f8f6f4)",
        blocks=(r"\bv_mfma_scale_f32_16x16x128_f8f6f4", r"\bv_mfma_scale_f32_16x16x128_f8f6f4", ""),
    ),
    "gfx1100": Ahead("hip", "gfx1100", 32, 64 << 10, r"\bv_wmma_f32_\w*bf16"),
}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
