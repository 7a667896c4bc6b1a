"""Attention of a decoded token in Triton: on the GPU, or in Triton's interpreter (see
`triton_on_device.py`). Run by `test_triton.py`, not collected by itself."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from test_attend import expected
from torch import Tensor

from microscale.backends.triton import attend as module
from microscale.backends.triton import tiles
from microscale.backends.triton.attend import Turn, attend, attend_token
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
    monkeypatch.setattr(tiles, "launch", lambda early, fused=True: {})
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
