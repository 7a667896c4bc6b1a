"""The Triton kernels of a decoded token beside its products: on the GPU, or in Triton's interpreter (see
`triton_on_device.py`). Run by `test_triton.py`, not collected by itself."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from test_attend import expected
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.backends import triton as backend
from microscale.backends.triton import attend as module
from microscale.backends.triton import rows as few
from microscale.backends.triton import tiles
from microscale.backends.triton.attend import Turn, attend, attend_token
from microscale.backends.triton.likeliest import Likeliest
from microscale.backends.triton.router import norm_and_product
from microscale.backends.triton.small import Choice, add_rms_norm, rms_norm, route, silu_gate
from microscale.backends.triton.total import total as added
from microscale.formats import FORMATS
from microscale.quant import quantize
from microscale.tolerance import unit_roundoff

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies bfloat16 as the integers that it keeps it in.
DTYPES = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)


def bounded(y: Tensor, wanted: tuple[Tensor, Tensor], q: Tensor, values: Tensor) -> None:
    """Within a float32 computation's bound, and what rounding each share to the values' dtype adds."""
    number, bound = wanted
    bound = bound + unit_roundoff(q.dtype) * values.double().abs().amax()
    worst = ((y.double() - number).abs() / bound).max().item() if y.numel() else 0.0
    assert worst <= 1.0, f"{worst:.3g} times the permitted error"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, heads, key_heads, tokens, width",
    [(1, 64, 8, 131, 64), (2, 6, 2, 7, 20), (1, 3, 3, 1, 1), (1, 2, 1, 0, 8), (1, 8, 1, 1030, 64),
     (2, 17, 1, 200, 128)],
)  # fmt: skip
@pytest.mark.parametrize("masked, sunk", [(False, True), (True, True), (False, False)])
def test_attend(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    key_heads: int,
    tokens: int,
    width: int,
    masked: bool,
    sunk: bool,
) -> None:
    q = torch.randn(batch, heads, 1, width, device=DEVICE).to(dtype)
    room = torch.full((batch, key_heads, tokens + 3, width + 5), torch.nan, device=DEVICE).to(dtype)
    k, v = (
        room.clone()[:, :, :tokens, :width].copy_(torch.randn(batch, key_heads, tokens, width)) for _ in "kv"
    )
    sinks = torch.randn(heads, device=DEVICE).to(dtype) if sunk else None
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, tokens, device=DEVICE) < 0.3
        mask[..., tokens // 2 :] = False  # a whole span of them, where there is one
        k, v = (t.masked_fill(~mask.mT, 3.0) for t in (k, v))
    y = attend(q, k, v, mask, sinks, 0.3)
    assert y.shape == (batch, 1, heads, width)
    if not (sunk or tokens):
        assert not y.isfinite().any() or not y.any(), "softmax over nothing"
        return
    bounded(y, expected(q, k, v, mask, sinks, 0.3), q, v if tokens else q)
    if masked:
        hidden = (t.masked_fill(~mask.mT, torch.nan) for t in (k, v))
        assert torch.equal(attend(q, *hidden, mask, sinks, 0.3), y), "a hidden key was looked at"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seen", [1, 255, 256, 257, 5000])
def test_a_ring_gives_the_bits_of_a_list(dtype: torch.dtype, seen: int) -> None:
    """Whatever room there is, and wherever the ring begins."""
    if INTERPRETED and seen > 300:  # as many programs as time allows
        seen = 600 if dtype == torch.float32 else 300
    q, sinks = torch.randn(2, 6, 1, 64, device=DEVICE).to(dtype), torch.randn(6, device=DEVICE).to(dtype)
    k, v = (torch.randn(2, 3, seen, 64, device=DEVICE).to(dtype) for _ in "kv")
    for slots in (seen, seen + 1, seen + 400, seen + 4400):  # up to where spans may have several steps
        for gone in (0, 5, 2 * slots + 3) if slots == seen else (0,):
            tokens = torch.arange(gone, gone + seen, device=DEVICE) % slots
            keys, values = (torch.full((2, 3, slots, 64), torch.nan, device=DEVICE).to(dtype) for _ in "kv")
            keys[:, :, tokens], values[:, :, tokens] = k, v
            last = torch.tensor([gone + seen - 1], device=DEVICE)
            found = attend(q, keys, values, None, sinks, 0.3, last)
            assert torch.equal(found, attend(q, k, v, None, sinks, 0.3)), (slots, gone)
            seen_all = torch.ones(1, 1, 1, seen, dtype=torch.bool, device=DEVICE)
            assert torch.equal(found, attend(q, k, v, seen_all, sinks, 0.3)), (slots, gone, "with a mask")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens, spans", [(900, 2), (1030, 1), (513, 4)])
def test_spans_of_several_steps(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool, tokens: int, spans: int
) -> None:
    """What a long context is, with fewer spans and so fewer keys."""
    monkeypatch.setattr(module, "_SPANS", spans)
    q, k, v = (
        torch.randn(2, n, t, 64, device=DEVICE).to(dtype) for n, t in ((6, 1), (2, tokens), (2, tokens))
    )
    sinks = torch.randn(6, device=DEVICE).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, tokens, device=DEVICE) < 0.3
        mask[..., : tokens // 2] = False  # whole steps, of a first span too
        k, v = (t.masked_fill(~mask.mT, torch.nan) for t in (k, v))
    y = attend(q, k, v, mask, sinks, 0.3)
    if mask is not None:
        k, v = (t.masked_fill(~mask.mT, 3.0) for t in (k, v))
    bounded(y, expected(q, k, v, mask, sinks, 0.3), q, v)
    for i in (0, 1):
        given = (t[i : i + 1] for t in (q, k, v))
        alone = attend(*given, None if mask is None else mask[i : i + 1], sinks, 0.3)
        assert torch.equal(alone, y[i : i + 1]), "another sequence mattered"


def test_as_many_spans_as_keep_a_gpu_busy() -> None:
    assert [module.spans_of(n) for n in (1, 4, 8, 12, 16, 32, 64, 300)] == [32, 32, 32, 16, 16, 8, 4, 1]
    for wide, itemsize, shared, sizes in (
        (64, 2, 227, (128, 8, 3)), (128, 2, 227, (128, 8, 2)), (128, 2, 64, (64, 4, 1)), (128, 4, 227, (128, 8, 1)),
        (16, 2, 227, (128, 4, 3)), (256, 4, 64, (16, 4, 1)),
    ):  # fmt: skip
        assert module.cut(wide, itemsize, shared << 10) == sizes


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
     (2, (7, 1), 5000), (1, (1, 1, 1), 8), (4, (4,), 248), (2, (3, 6, 3), 264), (1, (9,), 8192), (4, (5, 3), 2880)],
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
@pytest.mark.parametrize("batch, heads, key_heads, width", [(1, 64, 8, 64), (3, 4, 2, 16), (2, 3, 1, 10)])
@pytest.mark.parametrize(
    "slots, token, normed",
    [(7, 4, False), (7, 11, True), (7, 6, False), (130, 0, True), (130, 129, False), (300, 256, True),
     (300, 600, False), (9000, 8500, False)],
)  # fmt: skip
def test_a_token_is_turned_stored_and_looked_at(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    key_heads: int,
    width: int,
    slots: int,
    token: int,
    normed: bool,
) -> None:
    """The bits of `attend` with turned queries, and a key and value that lie in the ring already.

    Of normed heads within a unit or two of the last place: a mean is added up in another order.
    """
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    if INTERPRETED and slots > 1000:
        slots, token = 1200, 1100
    room = torch.full((batch, (heads + 2 * key_heads) * width + 3), torch.nan, device=DEVICE).to(dtype)
    parts = (
        room[:, : (heads + 2 * key_heads) * width]
        .normal_()
        .split([n * width for n in (heads, *[key_heads] * 2)], 1)
    )
    q, k, v = (t.unflatten(1, (-1, width))[:, :, None] for t in parts)
    cos, sin = (torch.randn(token + 1, width // 2, device=DEVICE).to(dtype) for _ in "cs")
    turn = Turn(cos, sin)
    if normed:
        norms = [Qwen3RMSNorm(width, 1e-3).to(DEVICE, dtype) for _ in "qk"]
        with torch.no_grad():
            for norm in norms:
                norm.weight.normal_()
            q, k = norms[0](q), norms[1](k)
        turn = Turn(cos, sin, norms[0].weight.detach(), norms[1].weight.detach(), 1e-3)
    whole = (torch.cat([t[token:], t[token:]], -1)[None] for t in (cos, sin))
    q, k = apply_rotary_pos_emb(q, k, *whole)
    sinks = torch.randn(heads, device=DEVICE).to(dtype)
    keys, values = (
        torch.full((batch, key_heads, slots, width), torch.nan, device=DEVICE).to(dtype) for _ in "kv"
    )
    for t in (keys, values):
        t[:, :, : token + 1] = torch.randn(batch, key_heads, min(token + 1, slots), width)
    slot, position = token % slots, torch.tensor([token], device=DEVICE)
    there = keys.clone(), values.clone()
    there[0][:, :, slot : slot + 1], there[1][:, :, slot : slot + 1] = k, v
    for t in (keys, values):
        t[:, :, slot] = torch.nan if token < slots else 9.0
    arrived = torch.zeros(batch * key_heads, dtype=torch.int32, device=DEVICE)
    for _ in "12":  # what a launch leaves behind does not matter to the next
        y = attend_token(*parts, turn, keys, values, sinks, 0.3, position, arrived)
        wanted = attend(q, *there, None, sinks, 0.3, position)
        assert not arrived.any()
        if not normed:
            assert torch.equal(y, wanted)
        near = 8 * unit_roundoff(dtype) * (1 + 0.3 * width) if normed else 0.0
        assert ((y - wanted).abs() <= near * values.nan_to_num(0).abs().max()).all()
        for found, right in zip((keys, values), there, strict=True):
            least = near * right.nan_to_num(0.0).abs().max()
            assert ((found.nan_to_num(77.0) - right.nan_to_num(77.0)).abs() <= least).all()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU does not say which lines it was asked for")
@pytest.mark.parametrize("width", [16, 80, 192])
def test_nothing_is_asked_for_past_a_cache(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Lines of keys and values of later steps, where kernels start early."""
    asked: list[int] = []
    early = replace(tiles.target(torch.device(DEVICE)), early=True)
    monkeypatch.setattr(tiles, "target", lambda device: early)
    monkeypatch.setattr(tiles, "launch", lambda early: {})
    monkeypatch.setattr(module, "_SPANS", 16)
    monkeypatch.setattr(module, "ask", lambda at: asked.extend(at.handle.data.ravel().tolist()))
    for name in ("gdc_wait", "gdc_launch_dependents"):
        monkeypatch.setattr(module, name, lambda: None)
    at_once = module.cut(max(16, 1 << (width - 1).bit_length()), 2, early.shared)[0]
    slots = 16 * at_once + 40
    q, k, v = (torch.randn(1, n * width, dtype=torch.float16) for n in (2, 1, 1))
    keys, values = (torch.randn(1, 1, slots, width, dtype=torch.float16) for _ in "kv")
    turn = Turn(*(torch.randn(slots, width // 2, dtype=torch.float16) for _ in "cs"))
    position, arrived = torch.tensor([slots - 1]), torch.zeros(1, dtype=torch.int32)
    attend_token(q, k, v, turn, keys, values, None, 0.3, position, arrived)
    assert asked
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (keys, values)]
    assert all(any(first <= at < end for first, end in ranges) for at in asked)


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
