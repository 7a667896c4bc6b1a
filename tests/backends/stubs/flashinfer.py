"""flashinfer-python 0.7.2.post1 (PyPI wheel, py3-none-any).

Signatures and checks: flashinfer/gemm/gemm_base.py (mm_fp4, mm_mxfp8, group_gemm_mxfp8_mxfp4_nt_groupwise and their
_check_* and _*_requirement functions). Places of an expert's scales: data/include/flashinfer/gemm/
group_gemm_mxfp4_groupwise_sm100.cuh. Scales are looked up byte by byte where the 128 x 4 layout has them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.elements import decode
from microscale.formats import E2M1, E4M3, E5M2, Element
from microscale.scales import e8m0_value

from . import check, install

FP8: dict[torch.dtype, Element] = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def mm_fp4(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    block_size: int = 16,
    use_8x4_sf_layout: bool = False,
    backend: str = "auto",
    use_nvfp4: bool = True,
    enable_pdl: bool = True,
) -> Tensor:
    check(a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0], f"shapes {a.shape}, {b.shape}")
    check(a.dtype == b.dtype == torch.uint8, f"a {a.dtype}, b {b.dtype}")
    check(a.is_contiguous() and b.stride(0) == 1, "a row-major, b column-major")
    check(a_descale.dtype == b_descale.dtype == torch.uint8, "scales")
    check(out_dtype in (torch.bfloat16, torch.float16), f"Unsupported output dtype: {out_dtype}")
    check(block_size == (16 if use_nvfp4 else 32), f"block_size {block_size}")
    check(not use_8x4_sf_layout, "128x4 scales")
    m, n, k = a.shape[0], b.shape[1], a.shape[1] * 2
    check(n % 8 == 0, f"CuTe-DSL FP4 GEMM requires N % 8 == 0, got n={n}")
    if alpha is not None:
        check(
            alpha.dtype == torch.float32 and alpha.numel() in (1, m), "alpha: a scalar or one scale per row"
        )
        check(
            alpha.numel() == 1 or backend == "cute-dsl", "per-token alpha is only implemented by 'cute-dsl'"
        )
    else:
        check(not use_nvfp4, "NVFP4 without its outer scale")
    groups = -(-k // block_size // 4) * 4
    check(a_descale.shape == (-(-m // 128) * 128, groups), f"a_descale {tuple(a_descale.shape)}")
    check(b_descale.shape == (groups, -(-n // 128) * 128), f"b_descale {tuple(b_descale.shape)}")
    check(b_descale.t().is_contiguous(), "b_descale is a transposed view")
    sa, sb = untile(a_descale, m, k // block_size), untile(b_descale.t(), n, k // block_size)
    left, right = numbers(a, E2M1, k), numbers(b.t(), E2M1, k)
    values = e4m3 if use_nvfp4 else e8m0
    y = (left * values(sa, block_size)) @ (right * values(sb, block_size)).T
    return (y if alpha is None else y * alpha.double().view(-1, 1)).to(out_dtype)


def mm_mxfp8(
    a: Tensor,
    b: Tensor,
    a_descale: Tensor,
    b_descale: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    use_8x4_sf_layout: bool = False,
    backend: str = "auto",
) -> Tensor:
    check(a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0], f"shapes {a.shape}, {b.shape}")
    (m, k), n = a.shape, b.shape[1]
    check(n >= 128 and k >= 128, f"MXFP8 requires n >= 128 and k >= 128, got n={n}, k={k}")
    check(n % 32 == 0 and k % 32 == 0, "K and N must be multiples of 32")
    check(a.dtype == b.dtype == torch.float8_e4m3fn, f"a {a.dtype}, b {b.dtype}")
    check(a.is_contiguous() and b.stride() == (1, k), "a row-major, b column-major")
    check(out_dtype in (torch.bfloat16, torch.float16), f"out_dtype {out_dtype}")
    for s, rows in ((a_descale, m), (b_descale, n)):
        check(s.dtype == torch.uint8 and s.dim() == 1, "1D 128x4-swizzled block scales")
        check(s.shape[0] == -(-rows // 128) * 128 * -(-k // 128) * 4, f"scales {tuple(s.shape)}")
    left = numbers(a, E4M3, k) * e8m0(untile(a_descale, m, k // 32), 32)
    return (left @ (numbers(b.t(), E4M3, k) * e8m0(untile(b_descale, n, k // 32), 32)).T).to(out_dtype)


def group_gemm_mxfp8_mxfp4_nt_groupwise(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    m_indptr: Tensor,
    mma_sm: int = 1,
    tile_m: int = 128,
    tile_n: int = 128,
    tile_k: int = 128,
    swap_ab: bool = True,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check(a.dtype in FP8, f"a must be a float8_e4m3fn or float8_e5m2 tensor, but got {a.dtype}")
    for name, t in (("b", b), ("a_scale", a_scale), ("b_scale", b_scale)):
        check(t.dtype == torch.uint8 and t.is_contiguous(), f"{name} must be a uint8 tensor")
    check(m_indptr.dtype == torch.int32, f"m_indptr must be a int32 tensor, but got {m_indptr.dtype}")
    check(out_dtype in (torch.bfloat16, torch.float16), f"out_dtype {out_dtype}")
    edges = m_indptr.tolist()
    experts, n, k = b.shape[0], b.shape[1], b.shape[2] * 2
    check(experts == len(edges) - 1, "b.shape[0] must equal num_groups")
    check(a.shape[1] == k and a.shape[0] == edges[-1], f"a {tuple(a.shape)}")
    check(n % 8 == 0 and k % 128 == 0, f"n {n}, k {k}")
    check(all(edge % 4 == 0 for edge in edges), "each element in m_indptr must be a multiple of 4")
    sf_n, sf_k = -(-n // 128) * 128, k // 32
    check(b_scale.shape == (experts, sf_n, sf_k), f"b_scale {tuple(b_scale.shape)}")
    starts = [(edge + e * 127) // 128 * 128 for e, edge in enumerate(edges)]
    check(a_scale.shape == (starts[-1], sf_k), f"a_scale {tuple(a_scale.shape)}")
    y = torch.full((a.shape[0], n), float("nan"), dtype=torch.float64)
    for e in range(experts):
        rows = edges[e + 1] - edges[e]
        if rows:
            sa = untile(a_scale.flatten()[starts[e] * sf_k :], rows, sf_k, whole=False)
            left = numbers(a[edges[e] : edges[e + 1]], FP8[a.dtype], k) * e8m0(sa, 32)
            right = numbers(b[e], E2M1, k) * e8m0(untile(b_scale[e], n, sf_k), 32)
            y[edges[e] : edges[e + 1]] = left @ right.T
    assert out_dtype is not None
    return y.to(out_dtype)


def numbers(codes: Tensor, element: Element, k: int) -> Tensor:
    return decode(codes.contiguous().view(torch.uint8), element, k, torch.float64)


def e8m0(s: Tensor, width: int) -> Tensor:
    return e8m0_value(s).double().repeat_interleave(width, 1)


def e4m3(s: Tensor, width: int) -> Tensor:
    return decode(s, E4M3, s.shape[1], torch.float64).repeat_interleave(width, 1)


def untile(s: Tensor, rows: int, columns: int, whole: bool = True) -> Tensor:
    wide = -(-columns // 4)
    check(
        not whole or s.numel() == -(-rows // 128) * 512 * wide, f"{s.numel()} scales for {rows} x {columns}"
    )
    r, c = torch.arange(rows)[:, None], torch.arange(columns)
    tile = (r // 128) * wide + c // 4
    return s.contiguous().flatten()[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4]


def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    install(monkeypatch, "flashinfer", __path__=[])
    functions = (mm_fp4, mm_mxfp8, group_gemm_mxfp8_mxfp4_nt_groupwise)
    return install(monkeypatch, "flashinfer.gemm", **{f.__name__: f for f in functions})
