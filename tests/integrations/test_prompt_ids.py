"""Token ids that no model takes are refused by `Decoder`, in a sentence, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_models import SIZES
from transformers import MistralConfig, MistralForCausalLM

from microscale import Decoder, MicroscaleError, PromptError


@pytest.fixture(scope="module")
def model() -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES)).eval()


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), r"the prompt is empty: its ids are \[1, 0\]"),
        (torch.zeros(0, 3, dtype=torch.int64), r"the prompt is empty: its ids are \[0, 3\]"),
        (torch.ones(3, dtype=torch.int64), r"integers \[B, T\], not torch.int64 \[3\]"),
        (torch.ones(1, 3), r"integers \[B, T\], not torch.float32 \[1, 3\]"),
        ([[1, 2]], r"a tensor \[B, T\], not list"),
        (torch.tensor([[1, 160]]), "token 160 is none of the model's 160"),
        (torch.tensor([[1, -1]]), "token -1 is none of the model's 160"),
    ],
)
def test_ids_are_refused(model: Any, ids: Any, why: str) -> None:
    with pytest.raises(PromptError, match=why) as refusal:
        Decoder(model).generate(ids, 3)
    assert isinstance(refusal.value, MicroscaleError)
    assert isinstance(refusal.value, ValueError)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_last_token_is_one(model: Any, dtype: torch.dtype) -> None:
    assert Decoder(model).generate(torch.tensor([[0, 159]], dtype=dtype), 2).shape == (1, 4)
