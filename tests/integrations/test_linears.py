"""Models whose linears the C++ core runs: the same numbers but for rounding, the same weights, a switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from original import write
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, GptOssTopKRouter

import microscale
from microscale.backends.dense_rules import refuse
from microscale.dense import DenseLinear, DenseModule
from microscale.integrations.hf.linears import dense_modules
from microscale.machine import detect
from microscale.oracle import Problem
from microscale.pages import _file_mappings
from microscale.tolerance import unit_roundoff

WHY = refuse(Problem("linear", "bf16", 1, 1).on(detect(), "cpu"))
if WHY is not None:
    pytest.skip(WHY, allow_module_level=True)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(path: Path, dtype: torch.dtype, tied: bool) -> Any:
    config = LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=tied, pad_token_id=0)
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


def decoded(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of a prompt, and of one token after another behind it."""
    with torch.no_grad():
        out = model(tokens[:, :8], use_cache=True)
        parts = [out.logits]
        for i in range(8, tokens.shape[1]):
            out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    return torch.cat(parts, 1).double()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_dense_model_differs_by_rounding_alone(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    theirs = llama(tmp_path, dtype, tied)
    ours = microscale.load(tmp_path, device="cpu")
    exact = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    made = [m for m in ours.modules() if isinstance(m, DenseLinear)]
    assert len(made) == 2 * 7 + 1
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    tokens = torch.randint(1, 128, (1, 20))
    wanted = decoded(exact, tokens)
    distance = [(decoded(model, tokens) - wanted).norm() for model in (ours, theirs)]
    assert distance[0] <= 1.5 * distance[1]


def test_weights_stay_where_the_file_is_mapped(tmp_path: Path) -> None:
    llama(tmp_path, torch.bfloat16, tied=False)
    model = microscale.load(tmp_path, device="cpu")
    with torch.no_grad():
        model(torch.tensor([[5]]))
    mappings = _file_mappings()
    for name, module in dense_modules(model):
        start = module.weight.data_ptr()
        inside = any(a <= start and start + module.weight.nbytes <= b for a, b, _ in mappings)
        assert inside, name


def test_the_switch_and_a_forced_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = llama(tmp_path, torch.bfloat16, tied=False)
    tokens = torch.randint(1, 128, (1, 12))
    for options in ({}, {"backend": "emulation"}):
        monkeypatch.setenv("MICROSCALE_DENSE", "" if options else "off")
        ours = microscale.load(tmp_path, device="cpu", **options)
        assert not any(isinstance(m, DenseModule) for m in ours.modules())
        assert torch.equal(decoded(ours, tokens), decoded(theirs, tokens))
    assert any(
        isinstance(m, DenseLinear) for m in microscale.load(tmp_path, device="cpu", backend="cpu").modules()
    )


def test_gpt_oss_routes_the_same(tmp_path: Path) -> None:
    """The router becomes ours; its logits, scores and ids are those of the class it was."""
    write(tmp_path)
    model = microscale.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    router = model.model.layers[0].mlp.router
    assert isinstance(router, DenseModule)
    assert isinstance(router, GptOssTopKRouter)
    router.weight.data.copy_(torch.randn(router.weight.shape))
    x = torch.randn(3, router.weight.shape[1]).bfloat16()
    with torch.no_grad():
        logits, scores, ids = router(x)
    exact = x.double() @ router.weight.double().T + router.bias.double()
    assert (logits.double() - exact).abs().max() <= 2.0**-7 * exact.abs().max()
    assert torch.equal(ids, logits.topk(router.top_k).indices)
    assert torch.equal(scores, logits.topk(router.top_k).values.softmax(1))


def test_hidden_states_and_router_logits_can_still_be_recorded(tmp_path: Path) -> None:
    write(tmp_path)
    model = microscale.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        out = model(torch.tensor([[5]]), output_router_logits=True, output_hidden_states=True)
    layers = model.config.num_hidden_layers
    assert len(out.router_logits) == layers
    assert len(out.hidden_states) == layers + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpt_oss_norms_are_those_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path)
    model = microscale.load(tmp_path, device="cpu", dtype=dtype)
    norm = model.model.norm
    assert isinstance(norm, GptOssRMSNorm)
    assert type(norm) is not GptOssRMSNorm
    norm.weight.data.normal_()
    n = norm.weight.numel()
    for rows in (0, 1, 8, 9):
        x = torch.randn(1, rows, n).to(dtype)
        exact = x.double() * (x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        exact = exact * norm.weight.double()
        with torch.no_grad():
            y = norm(x)
        u = unit_roundoff(dtype)
        assert ((y.double() - exact).abs() <= (1.01 * u + (n + 8) * 2.0**-24) * exact.abs() + 1e-30).all()
    asks = torch.randn(1, 1, n).to(dtype).requires_grad_()
    assert torch.equal(norm(asks), GptOssRMSNorm.forward(norm, asks))
    assert norm(asks).requires_grad
