"""Linears that requantising replaces: their hooks, every place that they are in, and those that it must not replace."""

from __future__ import annotations

import copy

import pytest
import torch
from dense_models import dense, logits, round_weights, some_tokens
from torch import Tensor, nn

from microscale.integrations.hf.requantize import dequantize_model, requantize
from microscale.nn import QuantLinear


@pytest.fixture
def tokens() -> Tensor:
    return some_tokens()


def test_hooks_stay_and_their_handles_remove_them(tokens: Tensor) -> None:
    model = dense("qwen3_moe")
    heard: list[str] = []
    linear = model.model.layers[0].self_attn.q_proj
    handles = [
        linear.register_forward_pre_hook(lambda *_: heard.append("before")),
        linear.register_forward_hook(lambda _m, _i, _k, y: heard.append("after") or 2 * y, with_kwargs=True),
        linear.register_full_backward_hook(lambda *_: heard.append("back")),
    ]
    for change, kind in ((lambda m: requantize(m, "mxfp8_e4m3"), QuantLinear), (dequantize_model, nn.Linear)):
        change(model)
        assert type(model.model.layers[0].self_attn.q_proj) is kind
        heard.clear()
        heeded = model(tokens, labels=tokens)
        heeded.loss.backward()
        assert heard == ["before", "after", "back"]
    for handle in handles:
        handle.remove()
    assert not torch.equal(model(tokens).logits, heeded.logits)
    assert heard == ["before", "after", "back"]


def test_a_linear_at_two_places_is_one_still(tokens: Tensor) -> None:
    model = dense("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj = first.q_proj
    reference = copy.deepcopy(model)
    report = requantize(model, "nvfp4", backend="emulation")
    assert isinstance(second.q_proj, QuantLinear)
    assert second.q_proj is first.q_proj
    round_weights(reference, "nvfp4", [row.name for row in report.rows])
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens), rtol=1e-4, atol=1e-4)
    dequantize_model(model)
    assert second.q_proj is first.q_proj


def test_a_linear_with_another_forward_is_left_alone(tokens: Tensor) -> None:
    model = dense("llama")
    linear = model.model.layers[0].self_attn.q_proj
    linear.forward = lambda x: nn.Linear.forward(linear, x) * 2
    report = requantize(model, "nvfp4")
    assert model.model.layers[0].self_attn.q_proj is linear
    assert "model.layers.0.self_attn.q_proj" not in [row.name for row in report.rows]
