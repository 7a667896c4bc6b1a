"""Fused attention with sinks against transformers' eager one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from original import write
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from microscale.integrations.hf.attention import NAME, fuse_sinks, sink_attention


def logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **options).logits.double()


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """gpt-oss with dense experts, and sinks that matter."""
    model = write(tmp_path)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(1.0, 2.0)
    return model


@pytest.mark.parametrize("length", [1, 7, 40, 200])  # the window is 8, and blocks of queries are 64
def test_equals_eager(model: Any, length: int) -> None:
    tokens = torch.randint(2, 160, (3, length))
    wanted = logits(model, tokens)
    assert fuse_sinks(model)
    assert model.config._attn_implementation == NAME
    found = logits(model, tokens)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e4)
    assert (logits(model, tokens) - wanted).abs().max() > 1e-2 * wanted.abs().max(), (
        "sinks made no difference"
    )


def test_equals_eager_with_padding_and_a_cache(model: Any) -> None:
    tokens = torch.randint(2, 160, (2, 20))
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    wanted, whole = model.generate(tokens, **options), logits(model, tokens, attention_mask=mask)
    fuse_sinks(model)
    found = logits(model, tokens, attention_mask=mask)
    seen = mask.bool()
    assert (found - whole)[seen].abs().max() <= 1e-4 * whole.abs().max()
    assert torch.equal(model.generate(tokens, **options), wanted)


@pytest.mark.parametrize("length", [7, 40, 200])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_mask_of_numbers_is_added_as_eager_attention_adds_it(
    model: Any, length: int, gradients: bool
) -> None:
    tokens = torch.randint(2, 160, (2, length))
    mask = torch.zeros(2, 1, length, length).masked_fill(
        torch.ones(length, length).triu(1).bool(), -torch.inf
    )
    mask[:, :, -1, ::2] = -1.5  # no mask of bools says this; sliding layers see as far as the others
    with torch.set_grad_enabled(gradients):
        wanted = model(tokens, attention_mask=mask).logits.detach()
        fuse_sinks(model)
        found = model(tokens, attention_mask=mask).logits.detach()
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_mask_of_ones_own_may_reach_beyond_the_window_and_ahead() -> None:
    q, k, v = (torch.randn(1, 2, 200, 16) for _ in range(3))
    sinks = torch.randn(2)
    mask = torch.rand(1, 1, 200, 200) < 0.5
    with torch.no_grad():
        found, _ = sink_attention(None, q, k, v, mask, 0.25, s_aux=sinks, sliding_window=8)
    logits = (0.25 * q @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    weights = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(1, -1, 200, 1)], dim=3).softmax(dim=3)
    torch.testing.assert_close(found, (weights[..., :-1] @ v).transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "length, window", [(2, None), (130, None), (72, 8), (73, 8), (300, 100), (1030, 300)]
)
def test_a_prompt_is_within_its_rounding_of_float64(
    dtype: torch.dtype, length: int, window: int | None
) -> None:
    """Keys that a mask hides are NaN-free but large, and a padded query, which sees nothing, gives 0."""
    batch, heads, key_heads, width, scale = 2, 6, 2, 16, 0.25
    q, k, v = (torch.randn(batch, h, length, width).to(dtype) for h in (heads, key_heads, key_heads))
    sinks = torch.randn(heads).to(dtype)
    at = torch.arange(length)
    seen = (at[:, None] >= at) & (at[:, None] - at < (window or length))
    mask = seen.expand(batch, 1, length, length).clone()
    if window:
        mask[0, :, :, :3] = False  # padding on the left
        k[0, :, :3] = v[0, :, :3] = 100.0
    with torch.no_grad():
        found, _ = sink_attention(
            None, q, k, v, mask if window else None, scale, s_aux=sinks, sliding_window=window
        )
    k, v = (t.double().repeat_interleave(heads // key_heads, 1) for t in (k, v))
    logits = (scale * q.double() @ k.transpose(2, 3)).masked_fill(~mask, -torch.inf)
    column = sinks.double().view(1, -1, 1, 1).expand(batch, -1, length, 1)
    weights = torch.cat([logits, column], dim=3).softmax(dim=3)[..., :-1]
    wanted, magnitude = (torch.einsum("bhqk,bhkd->bqhd", weights, t) for t in (v, v.abs()))
    # Weights are rounded before they meet the values, and so are the sums, before their share and behind it.
    eps = torch.finfo(dtype).eps / 2 + (length + 64) * 2.0**-23
    assert ((found.double() - wanted).abs() <= 4 * eps * magnitude + torch.finfo(dtype).tiny).all()
    if window:
        assert not found[0, :3].any()


def test_gradients_see_the_sinks() -> None:
    """PyTorch's kernel has none of the logarithm that shares come from, so it is left alone where they are wanted."""
    q, k, v = (torch.randn(1, 2, 12, 8, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, requires_grad=True)
    out, _ = sink_attention(None, q, k, v, None, 0.3, s_aux=sinks)
    out.square().sum().backward()
    logits = (0.3 * q @ k.transpose(2, 3)).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    weights = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(1, -1, 12, 1)], dim=3).softmax(dim=3)
    wanted = torch.autograd.grad((weights[..., :-1] @ v).square().sum(), sinks)[0]
    assert sinks.grad is not None
    assert (sinks.grad - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
        )
    ).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert not fuse_sinks(model)
    assert model.config._attn_implementation == "eager"
