"""What the Triton kernels make of activations that are stored in a format; run as `triton_on_device.py` is."""

from __future__ import annotations

import os

import pytest
import torch
from odd_numbers import odd_numbers

from microscale.accumulation import HOPPER_FP8
from microscale.activations import Activation
from microscale.backends import triton as backend
from microscale.backends.adapters.operands import quantized_rows
from microscale.backends.triton import rounded, tiles
from microscale.backends.triton_rules import accumulation, refuse_pair
from microscale.conformance import Case, cases, run
from microscale.errors import BackendError
from microscale.formats import FORMATS, activation_format, get_format
from microscale.machine import detect
from microscale.operands import stored
from microscale.quant import quantize
from microscale.tolerance import moe_budget

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes(case: Case) -> bool:
    """Whether the kernels take a case's activations, which are stored in a format."""
    act = activation_format(case.weight, case.act)
    return act is not None and refuse_pair(case.weight, act.name) is None


@pytest.mark.parametrize("case", [c for c in cases() if takes(c)], ids=lambda c: c.name)
def test_conformance_of_quantised_activations(case: Case, seed: int) -> None:
    how = accumulation(case.problem(detect(), DEVICE))
    worst = run(case, backend, DEVICE, torch.Generator().manual_seed(seed), how)
    assert worst <= 1.0, f"error is {worst:.3g} times the permitted one"


@pytest.mark.parametrize("name, act", [("mxfp4", "mxfp8_e4m3"), ("fp8_block128", "fp8_group128")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(name: str, act: str, dtype: torch.dtype, seed: int) -> None:
    if INTERPRETED and act == "fp8_group128":
        pytest.skip("numpy's order of summation depends on the shape")  # of MX numbers these sums are exact
    generator = torch.Generator().manual_seed(seed)
    w = quantize(torch.randn(192, 640, generator=generator), name).to(DEVICE)
    x = torch.randn(130, 640, generator=generator).to(DEVICE, dtype)
    packed = backend.pack_for(w, get_format(act))
    y = backend.linear(x, packed, act=get_format(act))
    for rows in (slice(0, 1), slice(3, 20), slice(60, 130)):
        assert torch.equal(backend.linear(x[rows], packed, act=get_format(act)), y[rows])
    # In the layout of 16-bit activations, too: where the two differ, it is converted.
    assert torch.equal(backend.linear(x, backend.pack(w), act=get_format(act)), y)


def test_pairs_without_a_kernel_are_refused() -> None:
    w = backend.pack(quantize(torch.randn(64, 128), "mxfp4").to(DEVICE))
    x = torch.randn(2, 128, device=DEVICE).bfloat16()
    for act in ("nvfp4", "fp8_group128"):
        with pytest.raises(BackendError, match=f"triton: activations .*{act}"):
            backend.linear(x, w, act=get_format(act))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*(n for n, f in FORMATS.items() if f.scale == "e8m0"), "fp8_group128"])
def test_activations_are_rounded_as_quantize_does(name: str, dtype: torch.dtype, seed: int) -> None:
    """Also where the last block is not whole."""
    act, generator = get_format(name), torch.Generator().manual_seed(seed)
    for k in (1, 31, 32, 128, 129, 1100):
        x = odd_numbers(k, dtype, generator).to(DEVICE)
        found = rounded.rows_of(x, act)
        if found.scales is None:
            expected = stored(x, act, torch.bfloat16)
            torch.testing.assert_close(found.x.to(torch.bfloat16), expected, rtol=0, atol=0, equal_nan=True)
            continue
        rows = quantized_rows(x, act)
        torch.testing.assert_close(found.scales, rows.scales, rtol=0, atol=0, equal_nan=True)
        same = (found.x[:, :k] & 0x7F) == (rows.codes & 0x7F)
        assert (same & ((found.x[:, :k] == rows.codes) | (rows.codes & 0x7F == 0))).all()  # -0 is 0 here
        assert not found.x[:, k:].any()
        codes, scales = rounded.codes_of(x, act, by_column=True, rows=16)
        assert codes.shape[0] == 16
        assert scales.stride() == (1, 16)
        assert torch.equal(codes[:7], found.x)
        torch.testing.assert_close(scales[:7], found.scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(
    INTERPRETED, reason="the interpreter has no conversion of the hardware, and this is many numbers"
)
def test_codes_of_many_numbers_are_those_of_quantize(seed: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for exponents in ((-3, 3), (-60, -20), (-140, -90), (60, 120)):
        size = torch.exp2(torch.randint(*exponents, (512, 1), generator=generator, device=DEVICE).float())
        x = torch.randn(512, 8192, generator=generator, device=DEVICE) * size
        codes, scales = rounded.codes_of(x, get_format("fp8_group128"))
        rows = quantized_rows(x, get_format("fp8_group128"))
        assert torch.equal(scales, rows.scales)
        assert torch.equal(codes & 0x7F, rows.codes & 0x7F)


HOPPER = not INTERPRETED and tiles.target(torch.device("cuda")).hopper


@pytest.mark.skipif(not HOPPER, reason="Hopper's own kernels are for sm_90")
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("tokens", [1, 5, 130, 700])
def test_experts_of_codes_on_hopper(
    monkeypatch: pytest.MonkeyPatch, tokens: int, biased: bool, seed: int
) -> None:
    """Few routes, which programs sort, and many; units that are full and not; the same bits alone, again, and from a
    graph; and no other kernel."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    act, silu = get_format("fp8_group128"), Activation("silu")
    w13, w2 = (quantize(random(7, *s) / 8, "fp8_block128") for s in ((768, 1184), (1184, 384)))
    packed = [backend.pack_for(w, act) for w in (w13, w2)]
    x, share = random(tokens, 1184).bfloat16(), random(tokens, 3).softmax(-1)
    ids = torch.randint(-1, 9, (tokens, 3), generator=generator).to(DEVICE)
    held = torch.tensor([3, 0, -1, 1, 2, 6, 5, -1, 4], device=DEVICE)
    biases = {"b13": random(7, 768).bfloat16(), "b2": random(7, 1184)} if biased else {}
    rest = biases | {"expert_map": held, "act": act}

    def experts(rows: slice) -> torch.Tensor:
        return backend.moe(x[rows], ids[rows], share[rows], *packed, silu, **rest)

    monkeypatch.setattr(backend.experts, "moe", None)
    y = experts(slice(None))
    worst = moe_budget(x, ids, share, w13, w2, silu, accumulation=HOPPER_FP8, **rest).worst(y)
    assert worst <= 1, f"error is {worst:.3g} times the permitted one"
    assert torch.equal(experts(slice(None)), y)
    for rows in (slice(0, 1), slice(3, 20), slice(tokens // 2, tokens)):
        assert torch.equal(experts(rows), y[rows])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = experts(slice(None))
    again.fill_(float("nan"))
    graph.replay()
    assert torch.equal(again, y)
