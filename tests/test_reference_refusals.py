"""What `reference.linear` and `reference.moe` refuse, and that the message has both values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from microscale.activations import Activation
from microscale.errors import BackendError
from microscale.formats import FORMATS
from microscale.quant import QuantTensor, quantize
from microscale.reference import linear, moe
from token_loop import (
    operands,
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 63)}, r"x: .*\(3, 64\).*\(3, 63\)"),
        ({"x": torch.zeros(())}, r"x: .*\(64,\).*\(\)"),
        ({"x": torch.zeros(3, 64, dtype=torch.int64)}, r"x: .*floating.*torch.int64"),
        ({"w": quantize(torch.zeros(2, 5, 64), "mxfp4")}, r"w: expected \[N, K\], found \(2, 5, 64\)"),
        ({"w": quantize(torch.zeros(64), "mxfp4")}, r"w: expected \[N, K\], found \(64,\)"),
        ({"bias": torch.zeros(4)}, r"bias: .*\(5,\).*\(4,\)"),
        ({"bias": torch.zeros(1, 5)}, r"bias: .*\(5,\).*\(1, 5\)"),
        ({"bias": torch.zeros(5, dtype=torch.int32)}, r"bias: .*floating.*torch.int32"),
        ({"dtype": torch.bfloat16}, r"dtype: expected torch.float32 or torch.float64, found torch.bfloat16"),
        ({"act": FORMATS["fp8_block128"]}, r"fp8_block128 shares a scale between 128 rows"),
    ],
)  # fmt: skip
def test_linear_refuses(change: dict[str, Any], message: str) -> None:
    args = {"x": torch.zeros(3, 64), "w": quantize(torch.zeros(5, 64), "mxfp4"), **change}
    with pytest.raises(BackendError, match=message):
        linear(**args)


def mx(*shape: int) -> QuantTensor:
    return quantize(torch.zeros(shape), "mxfp4")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(9, 41)}, r"x: .*\(9, 40\).*\(9, 41\)"),
        ({"x": torch.zeros(40)}, r"x: .*\(40,\)"),
        ({"x": torch.zeros(3, 3, 40)}, r"x: .*\(3, 3, 40\)"),
        ({"x": torch.zeros(9, 40, dtype=torch.int32)}, r"x: .*torch.int32"),
        ({"w13": mx(48, 40)}, r"w13 \[E, rows, H\].*\(48, 40\)"),
        ({"w2": mx(40, 24)}, r"w2 \[E, N, I\].*\(40, 24\)"),
        ({"w2": mx(4, 40, 24)}, r"5.* 4\b"),
        ({"w13": mx(5, 47, 40)}, r"47.*48"),
        ({"w2": mx(5, 40, 25)}, r"48.*50"),
        ({"activation": Activation("silu", gated=False)}, r"48.*24"),
        ({"topk_ids": torch.zeros(8, 3, dtype=torch.int64)}, r"topk_ids: .*9.*\(8, 3\)"),
        ({"topk_ids": torch.zeros(9, dtype=torch.int64)}, r"topk_ids: .*\[M, T\].*\(9,\)"),
        ({"topk_ids": torch.zeros(9, 3)}, r"topk_ids: expected integers, found torch.float32"),
        ({"topk_ids": torch.zeros(9, 3, dtype=torch.bool)}, r"topk_ids: expected integers, found torch.bool"),
        ({"topk_ids": torch.tensor([[0, 1, 5]] * 9)}, r"\b5 is not in \[-1, 5\).*E = 5"),
        ({"topk_ids": torch.tensor([[0, 1, -2]] * 9)}, r"-2 is not in \[-1, 5\).*E = 5"),
        ({"topk_ids": torch.tensor([[0, 1, 7]] * 9), "expert_map": torch.arange(7) % 5},
         r"\b7 is not in \[-1, 7\).*7 entries.*E = 5"),
        ({"topk_ids": torch.tensor([[0, 1, -3]] * 9), "expert_map": torch.arange(7) % 5}, r"-3 .*\[-1, 7\)"),
        ({"expert_map": torch.tensor([0, 1, 2, 3, 5])}, r"expert_map.*\b5 is not in \[-1, 5\).*E = 5"),
        ({"expert_map": torch.tensor([0, 1, 2, 3, -2])}, r"expert_map.*-2 is not in \[-1, 5\).*E = 5"),
        ({"expert_map": torch.zeros(5)}, r"expert_map: expected integers, found torch.float32"),
        ({"expert_map": torch.zeros(5, 1, dtype=torch.int64)}, r"expert_map: .*\(5, 1\)"),
        ({"topk_weights": torch.ones(9, 2)}, r"topk_weights: .*\(9, 3\).*\(9, 2\)"),
        ({"topk_weights": torch.ones(9, 3, dtype=torch.int64)}, r"topk_weights: .*torch.int64"),
        ({"b13": torch.zeros(5, 24)}, r"b13: .*\(5, 48\).*\(5, 24\)"),
        ({"b13": torch.zeros(5, 48, dtype=torch.int8)}, r"b13: .*torch.int8"),
        ({"b2": torch.zeros(40)}, r"b2: .*\(5, 40\).*\(40,\)"),
        ({"weight_on_input": True}, r"weight_on_input.*T = 1.*T = 3"),
        ({"dtype": torch.float16}, r"dtype: .*torch.float64, found torch.float16"),
        ({"act": FORMATS["fp8_block128"]}, r"fp8_block128 shares a scale between 128 rows"),
    ],
)  # fmt: skip
def test_moe_refuses(change: dict[str, Any], message: str) -> None:
    args = {**operands(), "b13": None, "b2": None, **change}
    with pytest.raises(BackendError, match=message):
        moe(**args)
