"""A decoded token of whole small models as a chain of Triton's kernels: on the GPU, or in Triton's interpreter (see
`triton_on_device.py`). Run by `test_triton.py`, not collected by itself."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from chain_models import MODELS, made

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("name, batch", [*((name, 1) for name in MODELS), ("gpt_oss", 5), ("qwen3_moe", 3)])
def test_a_token_of_a_model(name: str, batch: int) -> None:
    """All layers of a small model, past the point where its windows are full, beside the model's own forward."""
    from microscale.integrations.hf.architectures import KINDS
    from microscale.integrations.hf.attention import fuse_sinks
    from microscale.integrations.hf.chain import token
    from microscale.integrations.hf.chain_parts import chain_of, refuse_parts
    from microscale.integrations.hf.step_cache import StepCache

    model = made(name, DEVICE)
    length = 11 if INTERPRETED else 20
    ids = torch.randint(64, (batch, length), device=DEVICE)
    with torch.no_grad():
        wanted = model(ids).logits
    fuse_sinks(model)
    assert refuse_parts(model) is None
    assert (chain_of(model)[0] is None) == INTERPRETED
    cache = StepCache(model.config, 32, model.device)
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
        cache.start(7)
        for t in range(7, length):
            kind = KINDS[model.config.model_type]
            found = token(kind, model, ids[:, t : t + 1], cache).logits[:, 0]
            assert (found - wanted[:, t]).abs().max() <= 1e-4 * wanted.abs().max(), t
            cache.position.add_(1)
            cache.length += 1
    assert not cache.arrived.any()


@pytest.mark.parametrize(
    "name, fmt, batch", [("qwen3", "nvfp4", 1), ("qwen3_moe", "mxfp8_e4m3", 5), ("llama", "fp8_block128", 2)]
)
def test_a_token_of_a_quantised_model(name: str, fmt: str, batch: int) -> None:
    """Linears, experts and all but routers packed: beside the same numbers as plain weights."""
    import microscale
    from microscale.integrations.hf.architectures import KINDS
    from microscale.integrations.hf.chain import token
    from microscale.integrations.hf.chain_parts import refuse_parts
    from microscale.integrations.hf.requantize import dequantize_model
    from microscale.integrations.hf.step_cache import StepCache

    model = made(name, DEVICE)
    microscale.requantize(model, fmt, backend="emulation" if INTERPRETED else "triton")
    plain = dequantize_model(copy.deepcopy(model))
    assert refuse_parts(model) is None
    ids = torch.randint(64, (batch, 7), device=DEVICE)
    cache = StepCache(model.config, 32, model.device)
    with torch.no_grad():
        wanted = plain(ids).logits
        model(ids[:, :4], past_key_values=cache)
        cache.start(4)
        for t in range(4, 7):
            kind = KINDS[model.config.model_type]
            found = token(kind, model, ids[:, t : t + 1], cache).logits[:, 0]
            assert (found - wanted[:, t]).abs().max() <= 2e-4 * wanted.abs().max(), t
            cache.position.add_(1)
            cache.length += 1
