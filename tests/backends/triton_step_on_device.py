"""The Triton kernels of a decoded token beside its products: on the GPU, or in Triton's interpreter (see
`triton_on_device.py`). Run by `test_triton.py`, not collected by itself."""

from __future__ import annotations

import os

import pytest
import torch
from test_attend import expected
from torch import Tensor

from microscale.backends.triton.attend import attend
from microscale.backends.triton.small import rms_norm, route, turn_and_store
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
@pytest.mark.parametrize("masked", [False, True])
def test_attend(
    dtype: torch.dtype, batch: int, heads: int, key_heads: int, tokens: int, width: int, masked: bool
) -> None:
    q = torch.randn(batch, heads, 1, width, device=DEVICE).to(dtype)
    room = torch.full((batch, key_heads, tokens + 3, width + 5), torch.nan, device=DEVICE).to(dtype)
    k, v = (
        room.clone()[:, :, :tokens, :width].copy_(torch.randn(batch, key_heads, tokens, width)) for _ in "kv"
    )
    sinks = torch.randn(heads, device=DEVICE).to(dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, tokens, device=DEVICE) < 0.3
        mask[..., tokens // 2 :] = False  # a whole span of them, where there is one
        k, v = (t.masked_fill(~mask.mT, 3.0) for t in (k, v))
    y = attend(q, k, v, mask, sinks, 0.3)
    assert y.shape == (batch, 1, heads, width)
    bounded(y, expected(q, k, v, mask, sinks, 0.3), q, v if tokens else q)
    if masked:
        hidden = (t.masked_fill(~mask.mT, torch.nan) for t in (k, v))
        assert torch.equal(attend(q, *hidden, mask, sinks, 0.3), y), "a hidden key was looked at"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seen", [1, 63, 64, 65, 300])
def test_a_ring_gives_the_bits_of_a_list(dtype: torch.dtype, seen: int) -> None:
    """Whatever room there is, and wherever the ring begins."""
    q, sinks = torch.randn(2, 6, 1, 64, device=DEVICE).to(dtype), torch.randn(6, device=DEVICE).to(dtype)
    k, v = (torch.randn(2, 3, seen, 64, device=DEVICE).to(dtype) for _ in "kv")
    for slots in (seen, seen + 1, seen + 400):
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
@pytest.mark.parametrize("rows, width", [(1, 2880), (3, 1), (5, 96), (2, 128)])
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    x = (torch.randn(rows, 1, width, device=DEVICE) * 3).to(dtype)
    w = torch.randn(width, device=DEVICE).to(dtype)
    y, x64 = rms_norm(x, w, 1e-5).double(), x.double()
    wanted = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    relative = 1.01 * unit_roundoff(dtype) + (width + 8) * 2.0**-24
    assert ((y - wanted).abs() <= relative * wanted.abs() + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, heads, key_heads, width", [(1, 64, 8, 64), (3, 4, 2, 16), (2, 3, 1, 10)])
def test_turn_and_store(dtype: torch.dtype, batch: int, heads: int, key_heads: int, width: int) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    q, k, v = (torch.randn(batch, n, width, device=DEVICE).to(dtype) for n in (heads, key_heads, key_heads))
    cos, sin = (torch.randn(1, 1, width // 2, device=DEVICE).to(dtype) for _ in "cs")
    keys, values = (torch.full((batch, key_heads, 7, width), 9.0, device=DEVICE).to(dtype) for _ in "kv")
    slot = torch.tensor([4], device=DEVICE)
    y = turn_and_store(q, k, v, cos, sin, keys, values, slot)
    wanted_q, wanted_k = apply_rotary_pos_emb(q[:, :, None], k[:, :, None], cos, sin)
    assert torch.equal(y, wanted_q)
    assert torch.equal(keys[:, :, 4:5], wanted_k)
    assert torch.equal(values[:, :, 4], v)
    for t in (keys, values):
        assert (t[:, :, [0, 1, 2, 3, 5, 6]] == 9).all(), "another slot was written to"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, experts, top_k", [(1, 32, 4), (3, 128, 4), (2, 5, 3), (1, 1, 1)])
def test_route(dtype: torch.dtype, rows: int, experts: int, top_k: int) -> None:
    logits = torch.randn(rows, experts, device=DEVICE).to(dtype)
    weights, ids = route(logits, top_k)
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(ids, order)
    wanted = logits.double().gather(1, order).softmax(1)
    assert ((weights.double() - wanted).abs() <= 1.01 * unit_roundoff(dtype) * wanted + 2.0**-20).all()


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
