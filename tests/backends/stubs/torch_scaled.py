"""`torch.nn.functional.scaled_mm` of torch 2.13.0, with the block-scaled kernels' own checks.

Signature: torch 2.13.0+cpu, torch/nn/functional.py. Checks: aten/src/ATen/native/cuda/ScaledBlas.cpp
(_scaled_block1x128_block128x128, _scaled_mxfp8_mxfp8, _scaled_mxfp4_mxfp4, _scaled_nvfp4_nvfp4, sizes in
_scaled_mm_cuda_v2_out), aten/src/ATen/native/mkldnn/xpu/ScaledBlas.cpp and ScaledBlasUtils.cpp (check_*_recipe) of
pytorch's main branch. Scales of 128 x 4 tiles are looked up byte by byte where PTX says they are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from microscale.backends.adapters import torch_scaled
from microscale.elements import decode
from microscale.formats import E2M1, E4M3
from microscale.scales import e8m0_value

from . import check

BLOCKS = {ScalingType.BlockWise1x16: 16, ScalingType.BlockWise1x32: 32}


class Kernel:
    """The function, as on one kind of device.

    Attributes:
        device: "cuda" or "xpu".
        calls: how often it was called.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.calls = 0

    def scaled_mm(
        self,
        mat_a: Tensor,
        mat_b: Tensor,
        scale_a: Tensor,
        scale_recipe_a: ScalingType,
        scale_b: Tensor,
        scale_recipe_b: ScalingType,
        swizzle_a: SwizzleType | None = None,
        swizzle_b: SwizzleType | None = None,
        bias: Tensor | None = None,
        output_dtype: torch.dtype | None = torch.bfloat16,
        contraction_dim: tuple[int, ...] = (),
        use_fast_accum: bool = False,
    ) -> Tensor:
        self.calls += 1
        fp4 = mat_a.dtype == torch.float4_e2m1fn_x2
        check(mat_a.dtype == mat_b.dtype, f"mat_a {mat_a.dtype}, mat_b {mat_b.dtype}")
        check(fp4 or mat_a.dtype == torch.float8_e4m3fn, f"mat_a {mat_a.dtype}")
        check(mat_a.is_contiguous() and mat_b.stride(0) == 1, "row-major and column-major matrices only")
        check(mat_a.shape[1] == mat_b.shape[0], "mat_a and mat_b shapes cannot be multiplied")
        m, n, k = mat_a.shape[0], mat_b.shape[1], mat_a.shape[1] * (2 if fp4 else 1)
        check(k % 16 == 0 and n % 16 == 0, f"K {k} and N {n} must be divisible by 16")
        check(not (bias is not None and output_dtype == torch.float32), "no bias with a float32 result")
        check(not use_fast_accum, "fast accumulation is coarser than asked for")
        a, b = _values(mat_a, k), _values(mat_b.t(), k)
        if self.device == "xpu":
            check(swizzle_a == swizzle_b == SwizzleType.NO_SWIZZLE, "XPU does not support swizzle yet")
        if scale_recipe_a == ScalingType.BlockWise1x128:
            check(scale_recipe_b == ScalingType.BlockWise128x128, "a recipe that no weight here has")
            check(not fp4 and scale_a.dtype == scale_b.dtype == torch.float32, "scales must be Float")
            blocks = -(-k // 128)
            check(tuple(scale_a.shape) == (m, blocks), f"scale_a {tuple(scale_a.shape)}")
            padded = blocks if self.device == "xpu" else -(-blocks // 4) * 4
            check(tuple(scale_b.shape) == (padded, -(-n // 128)), f"scale_b {tuple(scale_b.shape)}")
            if self.device == "cuda":
                check(m % 4 == 0, "columns of scale_a must begin at multiples of 16 bytes")
                _strides("scale_a", scale_a, m)
                _strides("scale_b", scale_b, padded)
            sa = scale_a.double().repeat_interleave(128, 1)[:, :k]
            sb = scale_b[:blocks].double().t().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        else:
            check(scale_recipe_a == scale_recipe_b, "recipes differ")
            width = BLOCKS[scale_recipe_a]
            dtype = torch.float8_e4m3fn if width == 16 else torch.float8_e8m0fnu
            check(fp4 or width == 32, "a block of 16 is for FP4")
            check(scale_a.dtype == scale_b.dtype == dtype, f"scales {scale_a.dtype}, {scale_b.dtype}")
            check(scale_a.is_contiguous() and scale_b.is_contiguous(), "both scales should be contiguous")
            if width == 32 and fp4:
                check(output_dtype == torch.bfloat16 and bias is None, "f4f4bf16 gives bf16 without a bias")
            if self.device == "cuda":
                check(swizzle_a == swizzle_b == SwizzleType.SWIZZLE_32_4_4, "scales must be swizzled")
                sa, sb = (_untile(s, rows, k // width) for s, rows in ((scale_a, m), (scale_b, n)))
            else:
                check(width == 16, "no such kernel")
                check(tuple(scale_a.shape) == (m, k // 16) and tuple(scale_b.shape) == (n, k // 16), "shapes")
                sa, sb = scale_a.view(torch.uint8), scale_b.view(torch.uint8)
            sa, sb = (_scale_values(s, dtype).repeat_interleave(width, 1) for s in (sa, sb))
        return ((a * sa) @ (b * sb).T).to(output_dtype or torch.bfloat16)


def _values(codes: Tensor, k: int) -> Tensor:
    return decode(
        codes.contiguous().view(torch.uint8), E2M1 if codes.shape[1] * 2 == k else E4M3, k, torch.float64
    )


def _scale_values(s: Tensor, dtype: torch.dtype) -> Tensor:
    return e8m0_value(s).double() if dtype == torch.float8_e8m0fnu else decode(s, E4M3, s.shape[1]).double()


def _strides(what: str, s: Tensor, column: int) -> None:
    right = s.stride(0) == 1 and (s.stride(1) == column or (s.shape[1] == 1 and s.stride(1) == 1))
    check(right, f"{what} must have strides (1, {column}); got {s.stride()}")


def _untile(s: Tensor, rows: int, columns: int) -> Tensor:
    wide = -(-columns // 4)
    expected = -(-rows // 128) * 128 * wide * 4
    check(s.numel() == expected, f"a scale should have {expected} elements, got {s.numel()}")
    r, c = torch.arange(rows)[:, None], torch.arange(columns)
    tile = (r // 128) * wide + c // 4
    return s.view(torch.uint8).flatten()[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4]


def stub(monkeypatch: pytest.MonkeyPatch, device: str = "cuda") -> Kernel:
    kernel = Kernel(device)
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", kernel.scaled_mm)
    plain: Any = lambda d: device == "xpu"  # noqa: E731 (tensors here are on the CPU)
    monkeypatch.setattr(torch_scaled, "_plain", plain)
    return kernel
