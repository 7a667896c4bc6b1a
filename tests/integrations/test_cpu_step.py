"""A token on the CPU in one call of the core, against transformers' own modules over the same tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original import write
from step_models import SIZES
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import microscale
from microscale import env
from microscale.canary import Placer
from microscale.errors import SettingError
from microscale.integrations.hf import cpu_step, graph
from microscale.integrations.hf.cpu_cache import TokenCache
from microscale.integrations.hf.cpu_parts import Experts
from microscale.integrations.hf.cpu_step import CpuStep
from microscale.integrations.hf.graph import Decoder
from microscale.integrations.hf.linears import place_linears
from microscale.machine import detect

if not detect().core:
    pytest.skip(detect().core_missing, allow_module_level=True)

# float32 all through: two orders of summation, three layers deep. Each sum has at most a few hundred terms.
FP32_BOUND = 256 * 2.0**-24 * 8
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3}


def gpt_oss(directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Windows of 8 and full layers."""
    write(directory, **changes)
    return microscale.load(directory, dtype=dtype, device="cpu")


def placed(model: Any, dtype: torch.dtype) -> Any:
    """Random weights of a size that tells tokens apart, and the core's products."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_(1.0, 0.2)
            else:
                p.normal_(0.0, 0.15)
    model = model.to(dtype).eval()
    place_linears(model, dtype, Placer())
    return model


def llama(_: Path, dtype: torch.dtype = torch.float32) -> Any:
    return placed(LlamaForCausalLM(LlamaConfig(**SIZES)), dtype)


def mistral(_: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Windows alone."""
    return placed(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), dtype)


def qwen2(_: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Biases at q, k and v alone, and a tied head."""
    return placed(Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)), dtype)


def qwen3(_: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Norms of queries and keys."""
    return placed(Qwen3ForCausalLM(Qwen3Config(**SIZES)), dtype)


def packed_qwen3(_: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Every linear packed, but for the head."""
    model = qwen3(_, dtype)
    microscale.requantize(model, "mxfp8_e4m3")
    return model


def qwen3_moe(_: Path, dtype: torch.dtype = torch.float32, renormalize: bool = True) -> Any:
    """Experts packed, and a dense layer among them."""
    config = Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=renormalize, mlp_only_layers=[1])
    model = placed(Qwen3MoeForCausalLM(config), dtype)
    microscale.requantize(model, "mxfp4")
    return model


def qwen3_moe_shares(_: Path, dtype: torch.dtype = torch.float32) -> Any:
    return qwen3_moe(_, dtype, renormalize=False)


def mixtral(_: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Experts packed, whose routes keep float32 weights; windows alone."""
    config = MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2, sliding_window=8)
    model = placed(MixtralForCausalLM(config), dtype)
    microscale.requantize(model, "nvfp4", what=("experts",))
    return model


MODELS = [gpt_oss, llama, mistral, mixtral, qwen2, qwen3, packed_qwen3, qwen3_moe, qwen3_moe_shares]
Make = Callable[..., Any]


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, 160, (batch, length))


def eager(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    found: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
    return found


def step_behind(model: Any, ids: torch.Tensor, capacity: int = 64) -> CpuStep:
    """A step whose cache holds a prompt."""
    cache = TokenCache(model.config, capacity, model.device)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.start(ids.shape[1])
    return CpuStep(cpu_step.parts_for(model, ids.shape[0]), cache, ids.shape[0])


def steps(model: Any, ids: torch.Tensor, first: int, capacity: int = 64) -> torch.Tensor:
    """The logits behind each token from `first` on: [B, T - first, vocabulary]."""
    step = step_behind(model, ids[:, :first], capacity)
    with torch.no_grad():
        return torch.cat([step(ids[:, t : t + 1]).logits.clone() for t in range(first, ids.shape[1])], dim=1)


def modules(model: Any, ids: torch.Tensor, first: int) -> torch.Tensor:
    """The same by the model's modules, token by token, over transformers' cache."""
    with torch.no_grad():
        found = model(ids[:, :first], use_cache=True)
        logits = []
        for t in range(first, ids.shape[1]):
            found = model(ids[:, t : t + 1], past_key_values=found.past_key_values)
            logits.append(found.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_tokens_are_those_of_transformers(tmp_path: Path, make: Make, batch: int) -> None:
    model = make(tmp_path)
    decoder = Decoder(model)
    for length, new in ((5, 20), (8, 9), (1, 30), (43, 12)):  # a window fills on the way, before, never
        ids = prompt(batch, length)
        found = decoder.generate(ids, new, attention_mask=torch.ones_like(ids))
        assert decoder.why is None
        assert decoder.fused
        assert torch.equal(found, eager(model, ids, new)), (length, new)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_float32_logits_are_those_without_a_cache(tmp_path: Path, make: Make, batch: int) -> None:
    model, ids = make(tmp_path), prompt(batch, 30)
    with torch.no_grad():
        whole = model(ids).logits[:, 3:]
    found = steps(model, ids, 3)
    assert (found - whole).abs().max() <= FP32_BOUND * whole.abs().max()


@pytest.mark.parametrize("level", env.CPU_LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_of_gpt_oss_are_its_modules_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, dtype: torch.dtype
) -> None:
    """The same kernels, and between them the same roundings. Windows do not go round here: a ring has another order."""
    from microscale.backends import cpu_core

    monkeypatch.setenv("MICROSCALE_CPU_LEVEL", level)
    try:
        cpu_core.level()
    except SettingError as refusal:
        pytest.skip(str(refusal))
    model, ids = gpt_oss(tmp_path, dtype, sliding_window=32), prompt(2, 30)
    assert torch.equal(steps(model, ids, 4), modules(model, ids, 4))


@pytest.mark.parametrize("make", MODELS[1:], ids=lambda make: make.__name__)
def test_bf16_logits_are_no_worse_than_those_of_the_modules(tmp_path: Path, make: Make) -> None:
    """Both round to bf16 alike; what each loses against the same weights in float32 is the yardstick.

    Of the median token: where rounding flips a route, either may lose much more.
    """
    model, ids = make(tmp_path, torch.bfloat16), prompt(4, 40)
    found, same = steps(model, ids, 3), modules(model, ids, 3)
    wide = model.float()
    place_linears(wide, torch.float32, Placer())
    wanted = modules(wide, ids, 3).double()
    lost = [(logits.double() - wanted).abs().mean(dim=-1).median() for logits in (found, same)]
    assert 0 < lost[0] <= 1.5 * lost[1]


@pytest.mark.parametrize("make", [gpt_oss, mistral, llama], ids=lambda make: make.__name__)
@pytest.mark.parametrize("capacity", [6, 12])
def test_a_cache_grows(tmp_path: Path, make: Make, capacity: int) -> None:
    """Windows of 8: rings that are wider than the cache at first, and that have gone round when it grows."""
    model, ids = make(tmp_path), prompt(2, 40)
    assert torch.equal(steps(model, ids, 3, capacity), steps(model, ids, 3))


def test_generation_goes_on_beyond_the_room_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_step, "ROOM", 4)
    monkeypatch.setattr(graph, "_GRAIN", 8)
    model, ids = gpt_oss(tmp_path), prompt(1, 5)
    decoder = Decoder(model)
    assert torch.equal(decoder.generate(ids, 50), eager(model, ids, 50))
    assert decoder._cache is not None
    assert decoder._cache.capacity >= 55
    assert torch.equal(decoder.generate(ids, 50), eager(model, ids, 50)), "and over the cache of before"


def test_the_next_prompt_sees_nothing_of_this_one(tmp_path: Path) -> None:
    model, ids = gpt_oss(tmp_path), prompt(1, 6)
    decoder = Decoder(model)
    first = decoder.generate(ids, 10)
    cache = decoder._cache
    assert isinstance(cache, TokenCache)
    for layer in cache.steps:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    assert torch.equal(decoder.generate(ids, 10), first)
    assert decoder._cache is cache
    decoder.generate(prompt(2, 6), 4)
    assert decoder._cache is not cache, "it is for another batch"


def test_weights_are_those_of_the_moment(tmp_path: Path) -> None:
    model, ids = gpt_oss(tmp_path), prompt(1, 6)
    decoder = Decoder(model)
    decoder.generate(ids, 10)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj_bias.normal_()
            layer.self_attn.q_proj.weight.neg_()
    assert torch.equal(decoder.generate(ids, 10), eager(model, ids, 10))
    microscale.requantize(model, "mxfp6_e2m3")
    assert torch.equal(decoder.generate(ids, 10), eager(model, ids, 10))
    assert decoder.fused


def test_a_model_may_change_its_dtype(tmp_path: Path) -> None:
    model, ids = llama(tmp_path), prompt(1, 6)
    decoder = Decoder(model)
    decoder.generate(ids, 10)
    for dtype in (torch.bfloat16, torch.float32):
        model = model.to(dtype)
        place_linears(model, dtype, Placer())
        found = decoder.generate(ids, 10)
        assert decoder.fused
        if dtype is torch.float32:
            assert torch.equal(found, eager(model, ids, 10))


def test_threads_do_not_matter(tmp_path: Path) -> None:
    model, ids = gpt_oss(tmp_path, torch.bfloat16), prompt(2, 20)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(steps(model, ids, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_goes_on(tmp_path: Path) -> None:
    model, ids = gpt_oss(tmp_path), prompt(1, 9)
    wanted = steps(model, ids, 4)
    step = step_behind(model, ids[:, :4])
    with torch.no_grad():
        step(ids[:, 4:5])
        child = os.fork()
        if child == 0:
            found = [step(ids[:, t : t + 1]).logits.clone() for t in range(5, 9)]
            os._exit(0 if torch.equal(torch.cat(found, dim=1), wanted[:, 1:]) else 1)
        found = [step(ids[:, t : t + 1]).logits.clone() for t in range(5, 9)]
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(torch.cat(found, dim=1), wanted[:, 1:])


def test_a_hook_is_called_and_said(tmp_path: Path) -> None:
    model, ids = gpt_oss(tmp_path), prompt(1, 5)
    decoder = Decoder(model)
    wanted = decoder.generate(ids, 6)
    heard = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: heard.append(1))
    assert torch.equal(decoder.generate(ids, 6), wanted)
    assert (decoder.why, decoder.fused) == ("a hook listens to model.layers.1", False)
    assert len(heard) == 6
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    decoder.generate(ids, 6)
    assert (decoder.why, decoder.fused) == ("a hook listens to all modules", False)
    handle.remove()
    decoder.generate(ids, 6)
    assert decoder.fused


def test_what_is_no_chain_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = gpt_oss(tmp_path), prompt(2, 5)
    decoder = Decoder(model)

    def why(ids: torch.Tensor, **arguments: Any) -> str:
        found = decoder.generate(ids, 3, **arguments)
        assert found.shape == (ids.shape[0], 8)
        assert not decoder.fused
        return str(decoder.why)

    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    assert "padded" in why(ids, attention_mask=mask)
    assert "num_beams was given" in why(ids, num_beams=2)
    assert why(prompt(9, 5)) == "9 sequences are more than the 8 that the core reads weights once for"
    with torch.autocast("cpu"):
        assert why(ids) == "autocast chooses dtypes, and the chain has one"
    model.set_attn_implementation("eager")
    assert why(ids) == "its attention is eager, which the chain would not be"
    plain = MistralForCausalLM(MistralConfig(**SIZES)).eval()
    assert cpu_step.parts_for(plain, 1) == "a Linear in it is PyTorch's"
    moe = placed(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)), torch.float32)
    assert cpu_step.parts_for(moe, 1) == "its experts are not in a block format"
    with pytest.raises(ValueError, match="not in a block format"):
        CpuStep(cpu_step.parts_for(moe, 1), TokenCache(moe.config, 8, moe.device), 1)
    model = llama(tmp_path)
    model.model.norm.__class__ = type("OddNorm", (type(model.model.norm),), {})
    assert cpu_step.parts_for(model, 1) == "a OddNorm stands where a LlamaRMSNorm would"
    monkeypatch.setenv("MICROSCALE_DENSE", "off")
    assert cpu_step.parts_for(gpt_oss(tmp_path / "off"), 1) == "a Linear in it is PyTorch's"


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    step = step_behind(gpt_oss(tmp_path), prompt(1, 4))
    with pytest.raises(ValueError, match="out of range"):
        step(torch.tensor([[160]]))


@pytest.mark.parametrize("make", [mixtral, qwen3_moe], ids=lambda make: make.__name__)
def test_routes_have_weights_of_the_dtype_that_their_router_gives(tmp_path: Path, make: Make) -> None:
    model = make(tmp_path, torch.bfloat16)
    parts = cpu_step.parts_for(model, 1)
    assert not isinstance(parts, str)
    _, weights, _ = model.model.layers[0].mlp.gate(torch.randn(1, SIZES["hidden_size"]).bfloat16())
    experts = parts.layers[0].mlp
    assert isinstance(experts, Experts)
    assert experts.shares is weights.dtype
