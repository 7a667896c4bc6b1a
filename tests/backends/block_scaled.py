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
from microscale.backends.triton_rules import BLOCKS
from microscale.elements import decode
from microscale.formats import E2M1, E4M3, E5M2, FORMATS, Element
from microscale.scales import scale_value

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ARCH = "sm_100"  # which takes every pair
# Triton widens MX formats for other GPUs, and compiles NVFP4's products for those with units alone.
NVFP4 = INTERPRETED or tiles.target(torch.device(DEVICE)).multiplies(FORMATS["nvfp4"], FORMATS["nvfp4"])
PAIRS = [*((weight, act) for weight in BLOCKS for act in BLOCKS), *[("nvfp4", "nvfp4")] * NVFP4]
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
    """Codes [M, K] and [K, N], 4-bit ones two to a byte along K, with E8M0 bytes or E4M3 numbers [M, blocks] and
    [N, blocks].

    In float64, where sums of a few blocks are exact in any order.
    """
    assert (lhs_k_pack, rhs_k_pack, fast_math) == (True, True, False)
    left = _numbers(lhs.data, lhs_scale, _ELEMENTS[lhs_format])
    right = _numbers(rhs.data.T, rhs_scale, _ELEMENTS[rhs_format])
    with np.errstate(invalid="ignore"):
        return interpreter.TensorHandle((left @ right.T).astype(np.float32) + acc.data, acc.dtype.scalar)


def _numbers(codes: np.ndarray, scales: Any, element: Element) -> np.ndarray:
    """float64 [rows, K]."""
    packed, each = (torch.from_numpy(np.ascontiguousarray(t)) for t in (codes, scales.data))
    values = decode(packed, element, packed.shape[-1] * 8 // element.bits, torch.float64)
    kind = FORMATS["nvfp4" if scales.dtype.scalar == tl.float8e4nv else "mxfp4"]
    multipliers = scale_value(each, kind, torch.float64)
    return (values * multipliers.repeat_interleave(kind.block[1], -1)).numpy()
