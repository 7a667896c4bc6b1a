"""Models without quantisation load as transformers loads them, but for what is missing or lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import microscale
from microscale.errors import CheckpointError

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    pad_token_id=0,
)
QWEN = Qwen3MoeConfig(
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    vocab_size=128,
    pad_token_id=0,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "make", [lambda: LlamaForCausalLM(LLAMA), lambda: Qwen3MoeForCausalLM(QWEN)], ids=["llama", "qwen"]
)
def test_same_logits_as_transformers(tmp_path: Path, make: object, dtype: torch.dtype) -> None:
    make().to(dtype).save_pretrained(tmp_path)  # type: ignore[operator]
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = microscale.load(tmp_path, device="cpu")
    tokens = torch.randint(1, 128, (2, 12))
    assert found.dtype == dtype
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, wanted(tokens).logits)


def test_a_missing_tensor_is_an_error_not_random_numbers(tmp_path: Path) -> None:
    LlamaForCausalLM(LLAMA).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors missing.*|model\.layers\.1\.mlp\.up_proj\.weight"):
        microscale.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("no/such/place", "not a bundled name"),
        ("nothing", "not a bundled name"),
        ("../nothing", "no such directory"),
    ],
)
def test_names_that_stand_for_nothing(name: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        microscale.load(name)


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config"):
        microscale.load(tmp_path)
