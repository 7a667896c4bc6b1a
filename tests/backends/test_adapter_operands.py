"""What adapters do to operands before a call: layouts, quantised activations, refusals; and their error budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from microscale.accumulation import FLOAT32, HOPPER_FP8, Accumulation
from microscale.backends.adapters.common_rules import capability
from microscale.backends.adapters.operands import check_readable, one_tensor_scale, quantized_rows
from microscale.backends.adapters.tiles import tiled, untiled
from microscale.errors import BackendError
from microscale.formats import FP8_GROUP128
from microscale.operands import stored
from microscale.quant import QuantTensor, dequantize, quantize
from microscale.tolerance import linear_budget


@pytest.mark.parametrize("m, g", [(1, 1), (128, 4), (129, 5), (300, 90), (32, 3)])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_tiles_are_where_ptx_says_and_come_back(m: int, g: int, lead: tuple[int, ...]) -> None:
    scales = torch.randint(0, 256, (*lead, m, g), dtype=torch.uint8)
    tiles = tiled(scales)
    assert tiles.shape == (*lead, -(-m // 128) * 128 * -(-g // 4) * 4)
    assert torch.equal(untiled(tiles, m, g), scales)
    flat, one = tiles.reshape(-1, tiles.shape[-1])[0], scales.reshape(-1, m, g)[0]
    for r, c in ((0, 0), (m - 1, g - 1), (m // 2, g // 2)):
        tile = r // 128 * -(-g // 4) + c // 4
        assert flat[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] == one[r, c]


@pytest.mark.parametrize("act", ["mxfp8_e4m3", "mxfp4", "nvfp4", "fp8_group128"])
def test_activations_are_quantised_as_the_reference_does(act: str) -> None:
    from microscale.formats import get_format

    fmt = get_format(act)
    x = torch.randn(5, 256).bfloat16()
    q = quantized_rows(x, fmt)
    assert torch.equal(dequantize(q, torch.float64), stored(x, fmt, torch.float64))


def with_scale(w: QuantTensor, value: float) -> QuantTensor:
    scales = w.scales.clone()
    scales[0, 0] = value
    return replace(w, scales=scales)


@pytest.mark.parametrize(
    "fmt, value, wrong",
    [
        ("mxfp4", 255, "NaN or infinite"),
        ("mxfp4", 253, "outside 2 .. 252"),
        ("mxfp4", 1, "outside 2 .. 252"),
        ("mxfp8_e4m3", 9, "outside 10 .. 246"),
        ("mxfp8_e5m2", 240, "outside 17 .. 239"),
        ("nvfp4", 0x7F, "NaN or infinite"),
        ("nvfp4", 0xFF, "NaN or infinite"),
        ("fp8_block128", float("nan"), "NaN or infinite"),
        ("fp8_block128", float("inf"), "NaN or infinite"),
    ],
)
def test_what_a_kernel_would_read_wrongly_is_refused(fmt: str, value: float, wrong: str) -> None:
    w = quantize(torch.randn(128, 128), fmt)
    check_readable(w, "it")
    with pytest.raises(BackendError, match=wrong):
        check_readable(with_scale(w, value), "it")


def test_a_zero_block_may_have_any_finite_scale() -> None:
    w = quantize(torch.zeros(8, 64), "mxfp4")
    assert int(w.scales.max()) == 0
    check_readable(w, "it")


@pytest.mark.parametrize("fmt, code", [("mxfp8_e4m3", 0xFF), ("mxfp8_e5m2", 0x7C), ("mxfp8_e5m2", 0xFE)])
def test_weights_that_are_no_numbers_are_refused(fmt: str, code: int) -> None:
    w = quantize(torch.randn(8, 64), fmt)
    w.codes[3, 5] = code
    with pytest.raises(BackendError, match="a weight is NaN or infinite"):
        check_readable(w, "it")


def test_shards_with_scales_of_their_own_are_refused_where_there_is_one_argument() -> None:
    w = quantize(torch.randn(2, 8, 32), "nvfp4")
    assert one_tensor_scale(w, "it").shape == (2,)
    fused = quantize(torch.randn(2, 8, 32), "nvfp4", row_ranges=(4, 4))
    with pytest.raises(BackendError, match="one tensor scale for each matrix"):
        one_tensor_scale(fused, "it")


@pytest.mark.parametrize(
    "arch, number", [("sm_90", 90), ("sm_100a", 100), ("sm_121", 121), ("", 0), ("gfx942", 0), ("sm_x", 0)]
)
def test_capability(arch: str, number: int) -> None:
    assert capability(arch) == number


def coarse(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x w^T as such tensor cores add: 32 products and the sum cut to 13 bits below the largest, promoted every 128."""
    y = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    for start in range(0, x.shape[1], 128):
        total = torch.zeros_like(y)
        for k in range(start, start + 128, 32):
            p = torch.cat((x[:, None, k : k + 32] * w[None, :, k : k + 32], total[..., None]), dim=-1)
            step = 2.0 ** (p.abs().amax(-1, keepdim=True).clamp_min(1e-300).log2().floor() - 13)
            total = (torch.trunc(p / step) * step).sum(-1)
        y += total
    return y


def test_a_coarse_adder_stays_within_its_budget_and_beyond_that_of_float32() -> None:
    """K is small: with many products the worst case of float32 is larger than what is lost on average here."""
    x = torch.randn(16, 256, dtype=torch.float64)
    w = quantize(torch.randn(512, 256), "fp8_block128")
    a, d = stored(x, FP8_GROUP128, torch.float64), dequantize(w, torch.float64)

    def worst(y: torch.Tensor, how: Accumulation = FLOAT32) -> float:
        return linear_budget(x, w, act=FP8_GROUP128, dtype=torch.float32, accumulation=how).worst(y)

    y = coarse(a, d)
    assert worst(y) > 3.0
    assert 0.1 < worst(y, HOPPER_FP8) <= 1.0
    assert worst(a.flip(1) @ d.T, HOPPER_FP8) > 100.0
