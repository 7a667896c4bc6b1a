"""Small models for tests of steps, and a stand-in for CUDA graphs where there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original import write
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import microscale
from microscale.integrations.hf import graph
from microscale.integrations.hf import step as step_module
from microscale.integrations.hf.graph import refuse_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def gpt_oss(directory: Path) -> Any:
    """Windows of 8 and full layers, experts packed and run by microscale."""
    write(directory)
    return microscale.load(directory, dtype=torch.float32, device=DEVICE)


def gpt_oss_eager(directory: Path) -> Any:
    """With transformers' own attention, whose mask is added."""
    model = gpt_oss(directory)
    model.set_attn_implementation("eager")
    return model


def qwen(directory: Path) -> Any:
    """Full layers alone, and experts in float32 that know nothing of microscale."""
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)).float().eval().to(DEVICE)
    model.set_experts_implementation("batched_mm")  # which `generate` takes for steps; it waits for no device
    return model


def requantized_qwen(directory: Path) -> Any:
    model = qwen(directory)
    microscale.requantize(model, "mxfp8_e4m3")
    return model


def mistral(directory: Path) -> Any:
    """Windows alone."""
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).float().eval().to(DEVICE)


MODELS = [gpt_oss, gpt_oss_eager, qwen, requantized_qwen, mistral]


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA a graph's stand-in runs the step again, and writes to the output that it gave first."""
    if DEVICE == "cuda":
        return

    def again(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        output: dict[str, Any] = {}

        class Output:
            def __getattr__(self, name: str) -> Any:
                return getattr(output["now"], name)

            def __contains__(self, name: str) -> bool:
                return name in output["now"]

        return lambda: output.update(now=run()), Output()

    monkeypatch.setattr(step_module, "capture", again)
    monkeypatch.setattr(graph, "refuse", refuse_model)
    monkeypatch.setattr(graph, "chained", lambda model: False)


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, 160, (batch, length), device=DEVICE)


def eager(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    found: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
    return found
