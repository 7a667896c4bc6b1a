"""Block-scaled matrix units for GPUs, and interpreters, that have none."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.language import semantic
from triton.runtime import interpreter

from microscale.backends.triton import tiles
from microscale.elements import decode
from microscale.formats import E2M1, E4M3, E5M2, Element
from microscale.scales import e8m0_value

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ARCH = "sm_100"  # which takes every pair
_ELEMENTS = {
    ir.ScaleDotElemTypeTY.E2M1: E2M1,
    ir.ScaleDotElemTypeTY.E4M3: E4M3,
    ir.ScaleDotElemTypeTY.E5M2: E5M2,
}


def install(monkeypatch: pytest.MonkeyPatch, arch: str = ARCH) -> None:
    """The backend sees a GPU that multiplies codes with their scales.

    Triton's interpreter learns to do so; on a GPU without such units Triton multiplies the bfloat16 numbers that codes
    and scales stand for.
    """
    here = replace(tiles.target(torch.device(DEVICE)), arch=arch)
    monkeypatch.setattr(tiles, "target", lambda device: here)
    if INTERPRETED:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot_scaled", _dot_scaled, raising=False)
        usual = semantic.TritonSemantic.dot_scaled
        monkeypatch.setattr(
            semantic.TritonSemantic, "dot_scaled", lambda *given: usual(*map(_as_compiled, given))
        )


def _as_compiled(argument: Any) -> Any:
    """Which is how `dot_scaled` reads its words, and the interpreter hands it plain ones."""
    return tl.constexpr(argument) if isinstance(argument, str) else argument


def _dot_scaled(
    builder: Any,
    lhs: Any,
    lhs_scale: Any,
    lhs_format: Any,
    rhs: Any,
    rhs_scale: Any,
    rhs_format: Any,
    fast_math: bool,
    lhs_k_pack: bool,
    rhs_k_pack: bool,
    acc: Any,
) -> Any:
    """Codes [M, K] and [K, N], 4-bit ones two to a byte along K, with scale bytes [M, blocks] and [N, blocks].

    In float64, where sums of a few blocks are exact in any order.
    """
    assert (lhs_k_pack, rhs_k_pack, fast_math) == (True, True, False)
    left = _numbers(lhs.data, lhs_scale.data, _ELEMENTS[lhs_format])
    right = _numbers(rhs.data.T, rhs_scale.data, _ELEMENTS[rhs_format])
    with np.errstate(invalid="ignore"):
        return interpreter.TensorHandle((left @ right.T).astype(np.float32) + acc.data, acc.dtype.scalar)


def _numbers(codes: np.ndarray, scales: np.ndarray, element: Element) -> np.ndarray:
    """float64 [rows, K]."""
    packed = torch.from_numpy(np.ascontiguousarray(codes))
    values = decode(packed, element, packed.shape[-1] * 8 // element.bits, torch.float64)
    each = e8m0_value(torch.from_numpy(np.ascontiguousarray(scales)), torch.float64)
    return (values * each.repeat_interleave(32, -1)).numpy()
