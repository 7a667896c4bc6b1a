"""The Triton kernels of a decoded token but for experts and attention: on the GPU, or in Triton's interpreter (see
`triton_on_device.py`). Run by `test_triton.py`, not collected by itself."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.backends import triton as backend
from microscale.backends.triton import rows as few
from microscale.backends.triton.likeliest import Likeliest
from microscale.backends.triton.router import norm_and_product
from microscale.backends.triton.small import Choice, add_rms_norm, rms_norm, route, silu_gate
from microscale.backends.triton.tiles import Target
from microscale.backends.triton.total import total as added
from microscale.formats import FORMATS
from microscale.quant import quantize
from microscale.tolerance import unit_roundoff

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies bfloat16 as the integers that it keeps it in.
DTYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 2880), (3, 1), (5, 96), (2, 128)])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    x = (torch.randn(rows, 1, width, device=DEVICE) * 3).to(dtype)
    w = torch.randn(width, device=DEVICE).to(dtype)
    y, x64 = rms_norm(x, w, 1e-5).double(), x.double()
    wanted = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    relative = 1.01 * unit_roundoff(dtype) + (width + 8) * 2.0**-24
    tiny = torch.finfo(dtype).smallest_normal
    assert ((y - wanted).abs() <= relative * wanted.abs() + tiny).all()
    y = rms_norm(x, w, 1e-5, twice=True).double()
    assert (
        (y - wanted).abs() <= (2 * relative + relative**2) * wanted.abs() + tiny * (1 + w.double().abs())
    ).all()
    if dtype == torch.float32:
        return
    rounded = (x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(dtype) * w
    assert (y == rounded).double().mean() >= 0.9, "rounded before the weight"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_and_its_norm_are_the_sum_and_the_norm(dtype: torch.dtype) -> None:
    x, more = (torch.randn(3, 2880, device=DEVICE).to(dtype) for _ in "xm")
    w = torch.randn(2880, device=DEVICE)
    total, y = add_rms_norm(x, more, w, 1e-5)
    assert torch.equal(total, x + more)
    assert torch.equal(y, rms_norm(x + more, w, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows, top_k, width", [(1, 4, 2880), (3, 8, 2048), (2, 1, 96), (4, 3, 33)])
def test_shares_are_added_up_before_a_norm(
    dtype: torch.dtype, wide: bool, rows: int, top_k: int, width: int
) -> None:
    """As the kernel that adds them up alone does, to the bit; shares are wide where that is given float32."""
    x, w = torch.randn(rows, width, device=DEVICE).to(dtype), torch.randn(width, device=DEVICE)
    shares = torch.randn(rows, top_k, width, device=DEVICE).to(torch.float32 if wide else dtype)
    ids = torch.arange(top_k, device=DEVICE).expand(rows, -1)
    more = added(shares.view(-1, width), ids, None, top_k, dtype)
    for twice in (False, True):
        found, wanted = (add_rms_norm(x, t, w, 1e-5, twice) for t in (shares, more))
        assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "fp8_block128"])
@pytest.mark.parametrize(
    "tokens, experts, top_k, weights",
    [(1, 4, 2, None), (3, 4, 2, None), (1, 40, 4, None), (1, 130, 5, torch.float32)],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_shares_are_what_experts_add_up(
    dtype: torch.dtype,
    fmt: str,
    tokens: int,
    experts: int,
    top_k: int,
    weights: torch.dtype | None,
    interleaved: bool,
) -> None:
    """To the bit, also where each program chooses by the logits: among equal ones, and with a NaN, too."""
    if INTERPRETED and (experts > 4 or interleaved):
        pytest.skip("programs choose on Hopper only")
    w13, w2 = (
        backend.pack(quantize(torch.randn(experts, n, 128, device=DEVICE) / 8, FORMATS[fmt]))
        for n in (256, 128)
    )
    bias, ones = torch.randn(experts, 256, device=DEVICE), torch.ones(128, device=DEVICE)
    x = torch.randn(tokens, 128, device=DEVICE).to(dtype)
    activation = GPT_OSS if interleaved else Activation("silu")
    for times in (0.0, 0.4, 3.0, torch.nan):
        logits = torch.randn(tokens, experts, device=DEVICE).mul(times if times == times else 1).to(dtype)
        if times != times:
            logits[:, experts // 2] = torch.nan
        choice = Choice(logits, top_k, dtype=weights)
        shares = backend.shares(x, choice, w13, w2, activation, b13=bias)
        assert shares.shape == (tokens, top_k, 128)
        found = add_rms_norm(x, shares, ones, 1e-5)[0]
        shared, ids = choice.routes()
        wanted = x + backend.moe(x, ids, shared, w13, w2, activation, b13=bias)
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert found.isnan().all() == (times != times)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m, experts, k, twice, biased",
    [
        (1, 32, 2880, False, True),
        (4, 128, 2048, True, False),
        (3, 7, 96, True, True),
        (2, 5, 1100, False, False),
    ],
)
def test_a_norm_and_the_product_behind_it(
    dtype: torch.dtype, m: int, experts: int, k: int, twice: bool, biased: bool
) -> None:
    x, more = poisoned(m, k, dtype) * k**0.5, poisoned(m, k, dtype) * k**0.5
    norm, w = poisoned(1, k, dtype)[0] * k**0.5, poisoned(experts, k, dtype)
    bias = poisoned(1, experts, dtype)[0] if biased else None
    total, y, logits = norm_and_product(x, more, norm, 1e-5, twice, w, bias)
    assert torch.equal(total, x + more)
    plain = add_rms_norm(x, more, norm, 1e-5, twice)[1]
    # A mean that is added up in another order moves some numbers by a unit of the last place; rounded twice, by two.
    assert ((y.double() - plain.double()).abs() <= 6 * unit_roundoff(dtype) * plain.double().abs()).all()
    assert dtype == torch.float32 or (y == plain).double().mean() >= 0.9
    exact, size = y.double() @ w.double().T, y.double().abs() @ w.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = (k + 2) * 2.0**-24 * size + 1.01 * unit_roundoff(dtype) * exact.abs()
    assert ((logits.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()
    for i in range(m):
        alone = norm_and_product(x[i : i + 1], more[i : i + 1], norm, 1e-5, twice, w, bias)
        assert all(
            torch.equal(one[0], all_of[i]) for one, all_of in zip(alone, (total, y, logits), strict=True)
        )


def poisoned(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """Random [N, K] with NaNs before and behind it."""
    room = torch.full((n * k + 64,), torch.nan, device=DEVICE, dtype=dtype)
    return room[16 : 16 + n * k].view(n, k).copy_(torch.randn(n, k) / k**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m, sizes, k",
    [(1, (4096, 512, 512), 2880), (1, (2880,), 4096), (1, (32,), 2880), (4, (33, 2, 9), 288), (3, (5,), 104),
     (2, (7, 1), 5000), (1, (1, 1, 1), 8), (4, (4,), 248), (2, (3, 6, 3), 264), (1, (9,), 8192), (4, (5, 3), 2880),
     (1, (4093, 515, 512), 2880), (1, (17000, 7), 2312)],
)  # fmt: skip
def test_rows(dtype: torch.dtype, m: int, sizes: tuple[int, ...], k: int) -> None:
    """Against float64, with a bias or without; each token alone gives the same bits, and each matrix."""
    if INTERPRETED:
        sizes = tuple(min(n, 21) for n in sizes)
    x = poisoned(m, k, dtype)
    weights = [poisoned(n, k, dtype) for n in sizes]
    for biased in ((False,) * 3, (True,) * 3, (False, True, False)):
        biases = [poisoned(1, n, dtype)[0] if b else None for n, b in zip(sizes, biased, strict=False)]
        y = few.linear(x, weights, biases)
        assert y.shape == (m, sum(sizes))
        parts = list(zip(y.split(sizes, 1), weights, biases, strict=True))
        for found, w, bias in parts:
            exact, size = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
            if bias is not None:
                exact, size = exact + bias.double(), size + bias.double().abs()
            bound = (k + 2) * 2.0**-24 * size + 1.01 * unit_roundoff(dtype) * exact.abs()
            bound += torch.finfo(dtype).smallest_normal
            worst = ((found.double() - exact).abs() / bound).max().item()
            assert worst <= 1.0, f"{worst:.3g} times the permitted error"
            assert torch.equal(few.linear(x, [w], [bias]), found)
        for i in range(m):
            assert torch.equal(few.linear(x[i : i + 1], weights, biases), y[i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "taken", [few.Share(2, 8), few.Share(2, 3), few.Share(1, 11), few.Share(1, 1)], ids=str
)
@pytest.mark.parametrize("m, sizes, k", [(1, (13, 8, 1), 2680), (3, (9, 5), 2048)])
def test_rows_whatever_a_warp_takes(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    taken: few.Share,
    m: int,
    sizes: tuple[int, ...],
    k: int,
) -> None:
    """The same bits, also of rows past the last one of a matrix, behind which others lie."""
    if taken.held * 256 > k + 255:
        taken = replace(taken, held=-(-k // 256))
    x, weights = poisoned(m, k, dtype), [poisoned(n, k, dtype) for n in sizes]
    biases = [poisoned(1, n, dtype)[0] for n in sizes]
    wanted = few.linear(x, weights, biases)
    monkeypatch.setattr(few, "share", lambda *_: taken)
    assert torch.equal(few.linear(x, weights, biases), wanted)


def test_what_a_warp_takes_on_hopper() -> None:
    """By what was measured on a GPU of 132 multiprocessors: gpt-oss' and Qwen3's products, and routers."""
    hopper = Target(227 << 10, hopper=True, early=True, units=132)
    taken = {
        ((4096, 512, 512), 2880): few.Share(2, 8, 96),
        ((2880,), 4096): few.Share(1, 8),
        ((201088,), 2880): few.Share(1, 12),
        ((4096, 512, 512), 2048): few.Share(1, 8),
        ((2048,), 4096): few.Share(1, 16),
        ((151936,), 2048): few.Share(1, 8),
        ((32,), 2880): few.Share(1, 12),
        ((9,), 8192): few.Share(1, 8),
        ((5,), 104): few.Share(1, 1),
    }
    for (sizes, k), wanted in taken.items():
        assert few.share(sizes, k, 1, 2, hopper) == wanted
        for other in ((2, 2, hopper), (1, 4, hopper), (1, 2, Target(64 << 10))):
            assert few.share(sizes, k, *other) == few.Share(1, min(wanted.held, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, experts, top_k", [(1, 32, 4), (3, 128, 8), (2, 5, 3), (1, 1, 1), (2, 300, 6)])
def test_route(dtype: torch.dtype, rows: int, experts: int, top_k: int) -> None:
    logits = torch.randn(rows, experts, device=DEVICE).to(dtype)
    weights, ids = route(logits, top_k)
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(ids, order)
    wanted = logits.double().gather(1, order).softmax(1)
    assert ((weights.double() - wanted).abs() <= 1.01 * unit_roundoff(dtype) * wanted + 2.0**-20).all()
    weights, ids = route(logits, top_k, of_all=True, dtype=torch.float32)
    assert torch.equal(ids, order)
    assert weights.dtype == torch.float32
    assert ((weights.double() - logits.double().softmax(1).gather(1, order)).abs() <= 2.0**-20).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 513), (2, 768), (0, 5)])
def test_a_gate_between_two_products(dtype: torch.dtype, rows: int, width: int) -> None:
    both = (torch.randn(rows, 2 * width + 3, device=DEVICE) * 4).to(dtype)
    gate, up = both[:, :width], both[:, width : 2 * width]
    y, g = silu_gate(gate, up), gate.double()
    wanted = g * g.sigmoid() * up.double()
    near = 2.1 * unit_roundoff(dtype) + 2.0**-19
    assert ((y.double() - wanted).abs() <= near * wanted.abs() + 9 * torch.finfo(dtype).smallest_normal).all()


def test_route_among_equals_and_with_a_nan() -> None:
    logits = torch.zeros(3, 7, device=DEVICE)
    logits[1, 5] = float("nan")
    logits[2] = float("-inf")
    logits[2, 3] = 1.0
    weights, ids = route(logits, 3)
    assert ids.tolist() == [[0, 1, 2], [5, 0, 1], [3, 0, 1]]
    assert weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert weights[1].isnan().all()
    assert weights[2].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, vocabulary", [(1, 201088), (3, 1), (2, 2049), (1, 70000)])
def test_the_likeliest_token(dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    room = torch.full((rows, vocabulary + 3), torch.inf, device=DEVICE, dtype=dtype)
    logits = room[:, :vocabulary].copy_(torch.randn(rows, vocabulary) * 3 - 9)  # many are equal
    ids = torch.full((rows, 1), -1, device=DEVICE)
    likeliest = Likeliest(ids)
    for change in (0.0, -torch.inf, torch.nan):  # what a launch leaves behind does not matter to the next
        logits[-1, vocabulary // 2] += change
        likeliest.choose(logits)
        best = logits.nan_to_num(torch.inf).max(1, keepdim=True).values
        first = (logits.nan_to_num(torch.inf) == best).int().argmax(1, keepdim=True)
        assert torch.equal(ids, first)
        assert not likeliest._arrived.any()
