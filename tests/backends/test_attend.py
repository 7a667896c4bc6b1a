"""Attention of few queries in the C++ core against float64, and who gets it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.integrations.hf.attention import sink_attention
from microscale.tolerance import unit_roundoff

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expected(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The result in float64, and the bound of a float32 computation that is rounded once."""
    repeat = q.shape[1] // k.shape[1]
    q64, k64, v64 = (
        q.double(),
        k.double().repeat_interleave(repeat, 1),
        v.double().repeat_interleave(repeat, 1),
    )
    logits = q64 @ k64.mT * scale
    sizes = q64.abs() @ k64.abs().mT * scale
    size = sizes.amax(-1, keepdim=True) if k.shape[2] else 0.0
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    whole = logits
    if sinks is not None:
        whole = torch.cat([logits, sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    share = torch.softmax(whole, -1)[..., : k.shape[2]].nan_to_num(0.0)
    y, magnitude = share @ v64, share @ v64.abs()
    # A logit's error moves its weight and the sum of all; exponentials are good to a few units in the last place.
    relative = 2.0**-24 * (2 * size * (q.shape[-1] + 2) + 2 * k.shape[2] + 16)
    u = unit_roundoff(q.dtype)
    bound = relative * magnitude + 1.01 * u * y.abs() + 2 * u * torch.finfo(q.dtype).smallest_normal
    return y.transpose(1, 2), bound.transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, heads, key_heads, queries, tokens, width",
    [
        (1, 64, 8, 1, 131, 64),
        (2, 6, 2, 3, 7, 20),
        (1, 3, 3, 1, 1, 1),
        (3, 5, 1, 8, 40, 80),
        (1, 2, 1, 1, 0, 8),
    ],
)
def test_numbers(
    cpu: Any,
    level: str,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    key_heads: int,
    queries: int,
    tokens: int,
    width: int,
) -> None:
    q = torch.randn(batch, queries, heads, width).to(dtype).transpose(1, 2)
    room = torch.full((batch, key_heads, tokens + 3, width + 5), float("nan"), dtype=dtype)
    k, v = (
        room.clone()[:, :, :tokens, :width].copy_(torch.randn(batch, key_heads, tokens, width)) for _ in "kv"
    )
    sinks = torch.randn(heads).to(dtype)
    one = torch.rand(1, 1, queries, tokens) < 0.7
    for mask in (None, one, one.expand(batch, -1, -1, -1), torch.rand(batch, 1, queries, tokens) < 0.7):
        for s in (None, sinks):
            y = cpu.cpu_core.attend(q, k, v, mask, s, 0.3)
            wanted, bound = expected(q, k, v, mask, s, 0.3)
            assert y.shape == wanted.shape
            assert ((y.double() - wanted).abs() <= bound).all()


def test_threads_do_not_matter(cpu: Any, threads: Any) -> None:
    q, k, v = torch.randn(2, 16, 1, 64), torch.randn(2, 4, 600, 64), torch.randn(2, 4, 600, 64)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(cpu.cpu_core.attend(q, k, v, None, None, 0.125))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_model_gets_it_for_tokens_and_torch_keeps_the_rest(
    cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    attend = cpu.cpu_core.attend

    def counted(q: Tensor, *rest: Any) -> Any:
        seen.append(q.shape[2])
        return attend(q, *rest)

    monkeypatch.setattr(cpu.cpu_core, "attend", counted)
    q, k, v, sinks = (
        torch.randn(1, 4, 1, 16),
        torch.randn(1, 2, 9, 16),
        torch.randn(1, 2, 9, 16),
        torch.randn(4),
    )
    y, _ = sink_attention(None, q, k, v, None, 0.25, s_aux=sinks)
    assert seen == [1]
    asks = q.clone().requires_grad_()
    trained, _ = sink_attention(None, asks, k, v, None, 0.25, s_aux=sinks)
    assert trained.requires_grad
    assert (trained - y).abs().max() <= 1e-4
    trained.sum().backward()
    sink_attention(None, q, k, v, None, 0.25, dropout=0.5, s_aux=sinks)
    sink_attention(None, q.double(), k.double(), v.double(), None, 0.25, s_aux=sinks.double())
    sink_attention(None, torch.randn(1, 4, 9, 16), k, v, None, 0.25, s_aux=sinks)  # causal
    assert seen == [1]
    mask = torch.ones(1, 1, 3, 9, dtype=torch.bool)
    sink_attention(None, torch.randn(1, 4, 3, 16), k, v, mask, 0.25, s_aux=sinks)
    assert seen == [1, 3]
    torch.library.opcheck(torch.ops.microscale.attend.default, (q, k, v, None, sinks, 0.25))
