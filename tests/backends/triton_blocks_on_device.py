"""What the Triton kernels make of codes and scales that a block-scaled unit multiplies; run as `triton_on_device.py`
is, on GPUs and in an interpreter that are made to have such units: see `block_scaled`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from block_scaled import DEVICE, NVFP4, PAIRS, install
from odd_numbers import odd_numbers

from microscale.activations import GPT_OSS, Activation
from microscale.backends import triton as backend
from microscale.backends.adapters.operands import quantized_rows
from microscale.backends.triton import layout, rounded
from microscale.backends.triton.blocks import Blocks
from microscale.backends.triton_rules import BLOCKS
from microscale.conformance import Case, cases, run
from microscale.errors import BackendError
from microscale.formats import activation_format, get_format
from microscale.quant import quantize

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _units(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def takes(case: Case) -> bool:
    """Whether both sides of a case are codes for the units."""
    act = activation_format(case.weight, case.act)
    return act is not None and (case.weight, act.name) in PAIRS


def edges() -> Iterator[Case]:
    """Around one block and one group of K, for every pair; no token, a single one, and as many as the largest tile."""
    for weight, act in PAIRS:
        for m, n, k in (
            (2, 3, 1),
            (1, 1, 31),
            (3, 130, 32),
            (17, 2, 33),
            (130, 40, 129),
            (1, 3, 2880),
            (0, 4, 32),
        ):
            yield Case("linear", weight, m, n, k, act, bias=n > 1)
        moe = {"activation": GPT_OSS, "experts": 2, "top_k": 2}
        yield Case("moe", weight, 2, 31, 33, act, **moe)
        yield Case("moe", weight, 0, 31, 33, act, **moe)
        yield Case("moe", weight, 40, 1, 32, act, **moe, bias=False, crowded=True)
    weighted = {"activation": Activation("silu"), "experts": 4, "top_k": 1, "weight_on_input": True}
    yield Case("moe", "mxfp4", 9, 64, 96, "mxfp8_e4m3", **weighted)
    for dtype in DTYPES[1:]:
        yield Case("linear", "mxfp4", 3, 64, 96, "mxfp8_e4m3", dtype=dtype)
        yield Case("moe", "mxfp4", 3, 64, 96, "mxfp4", dtype=dtype, **moe)
        if NVFP4:
            yield Case("linear", "nvfp4", 3, 64, 96, "nvfp4", dtype=dtype)
            yield Case("moe", "nvfp4", 9, 64, 96, "nvfp4", dtype=dtype, **weighted)


@pytest.mark.parametrize("case", [*(c for c in cases() if takes(c)), *edges()], ids=lambda c: c.name)
def test_conformance_of_block_scaled_products(case: Case, seed: int) -> None:
    worst = run(case, backend, DEVICE, torch.Generator().manual_seed(seed))
    assert worst <= 1.0, f"error is {worst:.3g} times the permitted one"


@pytest.mark.parametrize("weight, act", PAIRS)
def test_a_row_does_not_depend_on_the_others(weight: str, act: str, seed: int) -> None:
    """To the bit, with NaN in other rows, too."""
    generator, fmt = torch.Generator().manual_seed(seed), get_format(act)
    w = quantize(torch.randn(140, 416, generator=generator), weight).to(DEVICE)
    x = torch.randn(130, 416, generator=generator).to(DEVICE).bfloat16()
    packed = backend.pack_for(w, fmt)
    assert isinstance(packed, Blocks)
    y = backend.linear(x, packed, act=fmt)
    for rows in (slice(0, 1), slice(3, 20), slice(60, 130)):
        assert torch.equal(backend.linear(x[rows], packed, act=fmt), y[rows])
    x[40:] = math.nan
    assert torch.equal(backend.linear(x, packed, act=fmt)[:40], y[:40])


def test_a_token_of_experts_does_not_depend_on_the_others(seed: int) -> None:
    generator, act = torch.Generator().manual_seed(seed), get_format("mxfp8_e4m3")
    w13, w2 = (
        backend.pack_for(quantize(torch.randn(4, n, k, generator=generator) / 10, "mxfp4").to(DEVICE), act)
        for n, k in ((128, 96), (96, 64))
    )
    x = torch.randn(130, 96, generator=generator).to(DEVICE).bfloat16()
    ids = torch.rand(130, 4, generator=generator).argsort(-1)[:, :2].to(DEVICE)
    weights = torch.rand(130, 2, generator=generator).to(DEVICE)
    y = backend.moe(x, ids, weights, w13, w2, GPT_OSS, act=act)
    for rows in (slice(0, 1), slice(3, 6), slice(90, 130)):
        found = backend.moe(x[rows], ids[rows], weights[rows], w13, w2, GPT_OSS, act=act)
        assert torch.equal(found, y[rows])


@pytest.mark.parametrize("weight, act", PAIRS)
def test_a_nan_scale_reaches_its_row_and_no_other(weight: str, act: str) -> None:
    """Of weights, and of activations that are not finite."""
    w, x = quantize(torch.randn(140, 200), weight), torch.randn(20, 200)
    w.scales[7, -1] = 0x7F if weight == "nvfp4" else 255
    w.codes[7] = 0
    x[3, 5], x[11, 199] = math.inf, math.nan
    fmt = get_format(act)
    y = backend.linear(x.to(DEVICE), backend.pack_for(w.to(DEVICE), fmt), act=fmt).cpu()
    wanted = torch.zeros(20, 140, dtype=torch.bool)
    wanted[[3, 11]] = wanted[:, 7] = True
    assert torch.equal(y.isnan(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*BLOCKS, "nvfp4"])
def test_activations_become_the_codes_of_quantize(name: str, dtype: torch.dtype, seed: int) -> None:
    """To the bit, -0 included; what lies behind K is 0."""
    act = get_format(name)
    for k in (1, 31, 32, 128, 129, 1100):
        x = odd_numbers(k, dtype, torch.Generator().manual_seed(seed)).to(DEVICE)
        codes, scales, outer = rounded.blocks_of(x, act)
        rows = quantized_rows(x, act)
        groups, columns, blocks = -(-k // 128), rows.codes.shape[1], rows.scales.shape[1]
        assert codes.shape == (7, groups * 16 * act.element.bits)
        assert scales.shape == (7, groups * 128 // act.block[1])
        assert torch.equal(codes[:, :columns], rows.codes)
        assert torch.equal(scales[:, :blocks], rows.scales)
        assert not codes[:, columns:].any()
        assert not (scales[:, blocks:] > 1).any()  # the least of E4M3's, and no NaN
        assert (outer is None) == (rows.tensor_scale is None)
        assert outer is None or torch.equal(outer, rows.tensor_scale)


@pytest.mark.parametrize("arch, codes", [("sm_90", False), ("sm_120", False), ("sm_100", True)])
def test_weights_are_packed_for_codes_where_units_take_the_pair(
    monkeypatch: pytest.MonkeyPatch, arch: str, codes: bool
) -> None:
    install(monkeypatch, arch)
    w = quantize(torch.randn(70, 160), "mxfp4").to(DEVICE)
    assert isinstance(backend.pack_for(w, get_format("mxfp8_e4m3")), Blocks) == codes
    assert not isinstance(backend.pack_for(w, None), Blocks)


def test_weights_packed_for_codes_take_other_activations() -> None:
    """In 16 bits, or in a format without such units."""
    w, x = quantize(torch.randn(70, 160), "mxfp4").to(DEVICE), torch.randn(5, 160).to(DEVICE).bfloat16()
    usual, packed = layout.pack(w), backend.pack_for(w, get_format("mxfp8_e4m3"))
    with pytest.warns(UserWarning, match="kept a second time"):
        y = backend.linear(x, packed)
    assert torch.equal(y, backend.linear(x, usual))
    six = get_format("mxfp6_e2m3")
    assert torch.equal(backend.linear(x, packed, act=six), backend.linear(x, usual, act=six))


def test_a_negative_scale_of_nvfp4_is_refused() -> None:
    w = quantize(torch.randn(4, 64), "nvfp4").to(DEVICE)
    w.scales[1, 2] = 0xC0
    with pytest.raises(BackendError, match="a scale is negative"):
        backend.pack_for(w, w.format)
    with pytest.raises(BackendError, match="those of nvfp4 are neither"):
        backend.linear(torch.randn(2, 64, device=DEVICE), backend.pack(w), act=w.format)
