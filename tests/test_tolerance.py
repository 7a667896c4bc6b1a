"""What a budget permits where numbers leave a dtype, and what it does not."""

from __future__ import annotations

import math

import pytest
import torch

from microscale.activations import Activation
from microscale.backends import emulation
from microscale.formats import FORMATS
from microscale.operands import stored
from microscale.quant import QuantTensor, quantize
from microscale.reference import activate
from microscale.tolerance import Budget, _through, dense_budget, linear_budget, moe_budget

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_output_beyond_the_dtype_is_an_infinity_of_its_sign(dtype: torch.dtype) -> None:
    largest = float(torch.finfo(dtype).max)
    expected = torch.tensor([1.1 * largest, -1.1 * largest, 0.5 * largest], dtype=torch.float64)
    budget = Budget(expected, expected.abs() * 1e-3)

    def worst(*values: float) -> float:
        return budget.worst(torch.tensor(values).to(dtype))

    right = 0.5 * largest
    assert worst(INF, -INF, right) <= 1.0
    for wrong in (
        (-INF, -INF, right),
        (INF, INF, right),
        (INF, -INF, INF),
        (INF, -INF, NAN),
        (NAN, -INF, right),
    ):
        assert worst(*wrong) == INF
    assert worst(0.0, -INF, right) > 1.0


def test_fp16_outputs_that_overflow_pass_the_canary_of_a_right_backend() -> None:
    w = quantize(torch.full((2, 64), 3.0), "mxfp4")
    x = torch.full((1, 64), 1000.0, dtype=torch.float16)
    y = emulation.linear(x, emulation.pack(w))
    assert torch.isinf(y).all()
    assert linear_budget(x, w).worst(y) <= 1.0
    assert linear_budget(x, w).worst(torch.zeros_like(y)) > 1.0
    assert linear_budget(x, w).worst(torch.full_like(y, NAN)) == INF
    assert dense_budget(x, torch.full((2, 64), 3.0).half()).worst(y) <= 1.0


def test_an_intermediate_that_overflows_frees_its_tokens_alone() -> None:
    w13, w2 = (quantize(torch.full((1, 32, 32), 1.0), "mxfp4") for _ in range(2))
    x = torch.ones(2, 32, dtype=torch.float16)
    x[0] = 60000.0
    ids, weights = torch.zeros(2, 1, dtype=torch.int64), torch.full((2, 1), 2.0**-11)
    budget = moe_budget(x, ids, weights, w13, w2, Activation("relu2", gated=False))
    assert torch.isinf(budget.bound[0]).all()
    assert torch.isfinite(budget.bound[1]).all()
    right = budget.expected.half()
    assert budget.worst(right) <= 1.0
    right[1] = NAN
    assert budget.worst(right) == INF


def test_an_intermediate_too_small_for_the_dtype_may_become_zero() -> None:
    # Two negative gates: silu(-100) is 4e-42, which hardware that knows no subnormal numbers takes for 0.
    w13, w2 = (
        quantize(torch.full((1, 64, 32), -1.0), "mxfp4"),
        quantize(torch.full((1, 32, 32), 1.0), "mxfp4"),
    )
    x = torch.full((1, 32), 100 / 32)
    ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    budget = moe_budget(x, ids, weights, w13, w2, Activation("silu", limit=1.0))
    assert (budget.expected != 0).all()
    assert budget.worst(torch.zeros(1, 32)) <= 1.0
    assert budget.worst(torch.full((1, 32), 1e-30)) > 1.0


def beyond(name: str) -> tuple[QuantTensor, QuantTensor]:
    """[2, 128] weights of finite codes, the largest scale just below, and at, the one that leaves float32."""
    fmt, shape = FORMATS[name], (2, 128)
    codes = quantize(torch.full(shape, -fmt.element.max), name).codes
    if fmt.scale == "f32":
        edge = 2.0**128 / fmt.element.max
        below, at = (torch.full(fmt.scale_shape(*shape), v) for v in (0.99 * edge, 1.01 * edge))
        return QuantTensor(fmt, shape, codes, below), QuantTensor(fmt, shape, codes, at)
    if fmt.scale == "e4m3":
        scales = torch.full(fmt.scale_shape(*shape), 0xFE, dtype=torch.uint8)  # -448
        edge = 2.0**128 / (448 * fmt.element.max)
        low, high = (torch.full((1,), v) for v in (0.99 * edge, 1.01 * edge))
        return QuantTensor(fmt, shape, codes, scales, low), QuantTensor(fmt, shape, codes, scales, high)
    values = max(abs(v) for v in fmt.element.values if math.isfinite(v))
    byte = next(b for b in range(255) if values * 2.0 ** (b - 127) >= 2.0**128)
    made = []
    for b in (byte - 1, byte):
        scales = torch.full(fmt.scale_shape(*shape), b, dtype=torch.uint8)
        scales[0, 0] = 255  # NaN hides nothing
        made.append(QuantTensor(fmt, shape, codes, scales))
    return made[0], made[1]


@pytest.mark.parametrize("name", FORMATS)
def test_emulation_computes_what_float32_cannot_hold(name: str) -> None:
    below, at = beyond(name)
    assert emulation.pack(below).work is torch.float32
    assert emulation.pack(at).work is torch.float64
    x = torch.zeros(3, 128)
    x[0], x[1] = 1e-30, -1e-30
    for w in (below, at):
        y = emulation.linear(x, emulation.pack(w))
        assert torch.isfinite(y[:, 1]).all()
        assert linear_budget(x, w).worst(y) <= 1.0


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_a_quantised_intermediate_moves_no_further_than_permitted(name: str, seed: int) -> None:
    """Each number by as much as its own error, up or down by chance, so that now and then scales take other codes."""
    generator = torch.Generator().manual_seed(seed)
    act, relu = FORMATS[name], Activation("relu2", gated=False)
    h = torch.randn(400, 80, generator=generator, dtype=torch.float64)
    error = 0.002 * h.abs()
    middle, moved = _through(h, error, relu, act, torch.float32)
    found = torch.zeros_like(moved)
    for _ in range(60):
        sign = torch.randint(0, 2, h.shape, generator=generator) * 2 - 1
        there = stored(activate(h + sign * error, relu), act, torch.float64)
        found = torch.maximum(found, (there - middle).abs())
    # Of two numbers that may be the largest one can go up and one down: a scale between those that are tried.
    size = activate(h, relu)
    ties = [
        (two[..., 1] > 0.98 * two[..., 0])
        for two in (size.topk(2).values, size.unflatten(-1, (-1, 16)).topk(2).values)
    ]
    beyond = (found > 1.001 * moved) & ~(ties[0] | ties[1].any(-1))[:, None]
    assert (found > 0).any(), "nothing moved: the test shows nothing"
    assert not beyond.any(), (
        f"{int(beyond.sum())} numbers, e.g. {found[beyond][0]:.3g} for {moved[beyond][0]:.3g}"
    )
