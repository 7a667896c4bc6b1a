"""amd-aiter 0.1.7.post2.dev18 (PyPI wheel, py3-none-any); names and arguments checked against ROCm/aiter, August 2026.

Signatures: aiter/ops/triton/gemm_afp4wfp4.py and gemm_a8w8_blockscale.py. What the kernels read:
aiter/ops/triton/_triton_kernels/ of the same names, above all scales of the last tile of K, which no mask guards.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.elements import decode
from microscale.formats import E2M1, E4M3
from microscale.scales import e8m0_value

from . import check, install

TILE = 1024  # the largest BLOCK_SIZE_K of its tables


def gemm_afp4wfp4(
    x: Tensor,
    w: Tensor,
    x_scales: Tensor,
    w_scales: Tensor,
    dtype: torch.dtype | None = torch.bfloat16,
    y: Tensor | None = None,
    config: dict[str, Any] | None = None,
) -> Tensor:
    (m, half), n = x.shape, w.shape[0]
    k = 2 * half
    check(w.shape == (n, half), f"w {tuple(w.shape)}")
    check(x.dtype == w.dtype == torch.uint8, "tl.dot_scaled takes e2m1 pairs as uint8")
    check(x_scales.dtype == w_scales.dtype == torch.uint8, "E8M0 scales as uint8")
    check(x_scales.shape == (m, k // 32) and w_scales.shape == (n, k // 32), "scales")
    check(k % 32 == 0, f"K {k}")
    left = decode(x.contiguous(), E2M1, k, torch.float64) * read(x_scales, k)
    right = decode(w.contiguous(), E2M1, k, torch.float64) * read(w_scales, k)
    return store(left @ right.T, dtype, y)


def read(s: Tensor, k: int) -> Tensor:
    """Scales of whole tiles, by the strides: beyond K they multiply zeros, and 0 times NaN is NaN."""
    wide = s.as_strided((s.shape[0], -(-k // TILE) * TILE // 32), s.stride(), s.storage_offset())
    check(not bool((wide[:, k // 32 :] == 255).any()), "a NaN is read behind the last scale")
    return e8m0_value(wide).double()[:, : k // 32].repeat_interleave(32, 1)


def gemm_a8w8_blockscale(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype | None = torch.bfloat16,
    y: Tensor | None = None,
    config: dict[str, Any] | None = None,
    skip_reduce: bool | None = False,
) -> Tensor:
    (m, k), n = x.shape, w.shape[0]
    check(x.shape[1] == w.shape[1], "Incompatible dimensions!!!")
    check(x.dtype == w.dtype == torch.float8_e4m3fn, f"x {x.dtype}, w {w.dtype}")
    check(x_scale.dtype == w_scale.dtype == torch.float32, "scales")
    check(k % 128 == 0, "GROUP_K must equal BLOCK_K, and scales of a partial block are not guarded")
    check(x_scale.shape == (m, k // 128) and w_scale.shape == (-(-n // 128), k // 128), "scales")
    left = decode(x.view(torch.uint8), E4M3, k, torch.float64) * x_scale.double().repeat_interleave(128, 1)
    scale = w_scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    right = decode(w.contiguous().view(torch.uint8), E4M3, k, torch.float64) * scale
    return store(left @ right.T, dtype, y)


def store(result: Tensor, dtype: torch.dtype | None, y: Tensor | None) -> Tensor:
    """In the dtype of y where there is one: the kernel casts to what its pointer says."""
    if y is None:
        return result.to(dtype or torch.bfloat16)
    check(y.shape == result.shape and y.dtype == dtype, f"y {tuple(y.shape)} {y.dtype}")
    return y.copy_(result)


def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    install(monkeypatch, "aiter.ops.triton", __path__=[])
    install(monkeypatch, "aiter.ops.triton.gemm_afp4wfp4", gemm_afp4wfp4=gemm_afp4wfp4)
    blockscale = {"gemm_a8w8_blockscale": gemm_a8w8_blockscale}
    return install(monkeypatch, "aiter.ops.triton.gemm_a8w8_blockscale", **blockscale)
