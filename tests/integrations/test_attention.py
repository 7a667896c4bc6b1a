"""Fused attention with sinks against transformers' eager one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from original import write
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from microscale.integrations.hf.attention import NAME, fuse_sinks


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


@pytest.mark.parametrize("length", [1, 7, 40])  # the window is 8
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


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
        )
    ).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert not fuse_sinks(model)
    assert model.config._attn_implementation == "eager"
