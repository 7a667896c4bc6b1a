"""vllm-xpu-kernels 0.1.16.2 (PyPI wheel, cp38-abi3-manylinux_2_28_x86_64).

Schemas: the strings that `_xpu_C.abi3.so` registers. Checks: csrc/xpu/onednn/onednn_matmul.cpp, fp4_gemm_w4a4.h,
fp8_gemm_w8a8.h and csrc/xpu/grouped_gemm/xe_2/grouped_gemm_xe2_interface.hpp of the repository (main branch,
August 2026). oneDNN reads the scales of weights [K, N] row-major as [K / group, N] (`set_scales` with groups {32, 1}),
and vLLM passes them so. The repository's own test of fp4_gemm passes [N, K / 32]; its results stay below 0.03 and its
absolute tolerance is 0.05, so it cannot tell.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.elements import decode
from microscale.formats import E2M1, E4M3, E5M2
from microscale.scales import e8m0_value

from . import check, install

SCHEMAS = (
    "fp8_gemm(Tensor A, Tensor B, ScalarType? out_dtype, Tensor? A_scale_, Tensor? B_scale_, Tensor? bias_) -> Tensor",
    "fp4_gemm(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, ScalarType? out_dtype, Tensor? bias_) -> Tensor",
    "cutlass_grouped_gemm_interface(Tensor ptr_A, Tensor? ptr_A_scale, Tensor ptr_B, Tensor? ptr_B_scale, "
    "Tensor? ptr_bias, Tensor ptr_D, Tensor rows_per_expert, int N, int K, int num_experts) -> Tensor",
)
ELEMENTS = {torch.float4_e2m1fn_x2: E2M1, torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def fp4_gemm(A: Tensor, B: Tensor, A_scale: Tensor, B_scale: Tensor, out: Any, bias: Tensor | None) -> Tensor:
    check(A.dtype == B.dtype == torch.float4_e2m1fn_x2, f"input {A.dtype}, weight {B.dtype}")
    check(A_scale.dtype == B_scale.dtype == torch.float8_e8m0fnu, "unsupported scale type for fp4 matmul")
    return matmul(A, B, A_scale, B_scale, out, bias)


def fp8_gemm(
    A: Tensor, B: Tensor, out: Any, A_scale: Tensor | None, B_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    check(A.dtype == B.dtype and A.dtype in ELEMENTS, f"input {A.dtype}, weight {B.dtype}")
    assert A_scale is not None
    assert B_scale is not None
    check(A_scale.dim() == 2 and A_scale.shape[1] > 1, "that would be a scale for each token")
    return matmul(A, B, A_scale, B_scale, out, bias)


def matmul(A: Tensor, B: Tensor, A_scale: Tensor, B_scale: Tensor, out: Any, bias: Tensor | None) -> Tensor:
    check(A.dim() == 2 and B.dim() == 2 and A.shape[1] == B.shape[0], f"shapes {A.shape}, {B.shape}")
    check(A.stride(1) == 1 and B.stride(0) == 1, "row-major input, weight in NT format")
    check(A_scale.is_contiguous() and B_scale.is_contiguous(), "scales must be contiguous")
    check(out in (torch.float16, torch.bfloat16), f"output must be float16 or bfloat16, not {out}")
    element = ELEMENTS[A.dtype]
    m, n, k = A.shape[0], B.shape[1], A.shape[1] * 8 // element.bits
    if bias is not None:
        check(bias.is_contiguous() and bias.shape == (n,), f"bias {tuple(bias.shape)}")
        check(bias.dtype in (torch.float32, torch.bfloat16, torch.float16), f"bias {bias.dtype}")
    check(A_scale.shape == (m, B_scale.shape[0]), f"A_scale {tuple(A_scale.shape)}")
    group_k, group_n = k // B_scale.shape[0], n // B_scale.shape[1]
    check(group_k * B_scale.shape[0] == k and group_n * B_scale.shape[1] == n, "groups divide the matrix")
    a = numbers(A, k) * values(A_scale).repeat_interleave(group_k, 1)
    b = numbers(B.t(), k) * values(B_scale).repeat_interleave(group_k, 0).repeat_interleave(group_n, 1).t()
    y = a @ b.T
    return (y if bias is None else y + bias.double()).to(out)


def grouped(
    ptr_A: Tensor,
    ptr_A_scale: Tensor | None,
    ptr_B: Tensor,
    ptr_B_scale: Tensor | None,
    ptr_bias: Tensor | None,
    ptr_D: Tensor,
    rows_per_expert: Tensor,
    N: int,
    K: int,
    num_experts: int,
) -> Tensor:
    check(N % 8 == 0, "N must be divisible by 8")
    check(ptr_A.dtype == ptr_D.dtype == torch.bfloat16, f"A {ptr_A.dtype}, D {ptr_D.dtype}")
    for t in (ptr_A, ptr_B, ptr_D):
        check(t.is_contiguous(), "A, B and D must be contiguous")
    check(ptr_A_scale is None, "Xe2 consumes high-precision A")
    assert ptr_B_scale is not None
    check(ptr_B_scale.is_contiguous() and ptr_B_scale.dim() == 3, "scales must be 3D and contiguous")
    check(rows_per_expert.dtype == torch.int32 and rows_per_expert.shape == (num_experts,), "rows_per_expert")
    check(ptr_A.shape[1] == K and ptr_D.shape == (ptr_A.shape[0], N), "shapes of A and D")
    fp4 = ptr_B.dtype == torch.float4_e2m1fn_x2
    check(
        ptr_B.shape == ((num_experts, N, K // 2) if fp4 else (num_experts, K, N)), f"B {tuple(ptr_B.shape)}"
    )
    if ptr_bias is not None:
        check(ptr_bias.dtype == ptr_A.dtype, "the bias is read as A's dtype")
        check(ptr_bias.shape == (num_experts, N) and ptr_bias.is_contiguous(), "bias")
    s = ptr_B_scale
    if fp4:
        check(s.shape[:2] == (num_experts, N) and K // s.shape[2] == 32, f"scales {tuple(s.shape)}")
    else:
        check(s.dtype == torch.uint8, "weights times float32 scales are rounded to bf16")
        if s.shape[1:] == (K // 32, N):  # also where [N, K / 32] was meant and has this shape
            s = s.transpose(1, 2)
        check(s.shape == (num_experts, N, K // 32), f"scales {tuple(s.shape)}")
    ends = rows_per_expert.cumsum(0).tolist()
    check(ends[-1] == ptr_A.shape[0], "rows of all experts")
    for e, end in enumerate(ends):
        part = slice(end - int(rows_per_expert[e]), end)
        codes = numbers(ptr_B[e] if fp4 else ptr_B[e].t(), K)
        w = (codes * values(s[e]).repeat_interleave(32, 1)).bfloat16()  # decoded to bf16 in registers
        y = ptr_A[part].double() @ w.double().T
        ptr_D[part] = (y if ptr_bias is None else y + ptr_bias[e].double()).to(ptr_D.dtype)
    return ptr_D


def numbers(codes: Tensor, k: int) -> Tensor:
    return decode(codes.contiguous().view(torch.uint8), ELEMENTS[codes.dtype], k, torch.float64)


def values(s: Tensor) -> Tensor:
    return s.double() if s.dtype == torch.float32 else e8m0_value(s.view(torch.uint8)).double()


def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are registered while the test runs."""
    library = torch.library.Library("_xpu_C", "FRAGMENT")
    for schema, function in zip(SCHEMAS, (fp8_gemm, fp4_gemm, grouped), strict=True):
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CPU")
    monkeypatch.setattr(torch.ops._xpu_C, "stub", library, raising=False)
    install(monkeypatch, "vllm_xpu_kernels", __path__=[])
    install(monkeypatch, "vllm_xpu_kernels._xpu_C")
    return library
