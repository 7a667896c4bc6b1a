"""Which models are stepped by a chain of kernels, and what is said of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from step_models import DEVICE, anywhere, gpt_oss, mistral, prompt, qwen  # noqa: F401 (a fixture for all tests)
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers import (
    BloomConfig,
)

from microscale.integrations.hf.graph import Decoder
from microscale.integrations.hf.step_cache import StepCache


def test_a_model_is_stepped_by_a_chain_of_kernels_unless_somebody_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice, and that it is told: kernels for a token stand aside here, and the model's forward for them."""
    from microscale.integrations.hf import attention, chain, chain_parts
    from microscale.integrations.hf.gpt_oss import DenseGptOssRMSNorm, StepGptOssRouter, take_steps

    model, ids = gpt_oss(tmp_path), prompt(1, 5)
    for module in model.modules():  # as they are on a GPU, where the core takes no router
        if "Router" in type(module).__name__:
            module.__class__ = StepGptOssRouter.__mro__[1]
        elif type(module).__name__ == "DenseLinear":
            module.__class__ = torch.nn.Linear
    take_steps(model)
    assert {type(m).__name__ for m in model.modules()} >= {
        DenseGptOssRMSNorm.__name__,
        StepGptOssRouter.__name__,
    }
    if DEVICE == "cpu":
        assert "for CUDA from sm_80 on, and the model is on cpu" in str(chain_parts.chain_of(model)[1])
    with monkeypatch.context() as older:  # as on GPUs that Triton's kernels are not for
        older.setattr(chain_parts, "triton_steps", lambda device: False)
        older.setattr(attention, "device_kind", lambda device: "cuda")
        older.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        older.setattr(attention, "detect", lambda: SimpleNamespace(packages=()))
        assert str(chain_parts.refuse(model)).endswith("and the package triton is not installed")
        older.setattr(attention, "detect", lambda: SimpleNamespace(packages=(("triton", "3.6.0"),)))
        older.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert str(chain_parts.refuse(model)).endswith("for CUDA from sm_80 on, and this GPU is sm_75")
        older.setattr(attention, "device_kind", lambda device: "rocm")
        assert str(chain_parts.refuse(model)).endswith("and the model is on rocm")
    monkeypatch.setattr(chain_parts, "triton_steps", lambda device: True)
    taken: list[int] = []

    def token(kind: Any, model: Any, ids: torch.Tensor, cache: StepCache) -> Any:
        taken.append(1)
        masks, position = cache.begin_step(None), cache.position.expand(len(ids), 1)
        return type(model).forward(
            model, input_ids=ids, attention_mask=masks, position_ids=position, past_key_values=cache
        )

    monkeypatch.setattr(chain, "token", token)
    decoder = Decoder(model)
    wanted = decoder.generate(ids, 12)
    assert (decoder.why, decoder.fused, decoder.why_modules) == (None, True, None)
    assert taken

    heard: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *_: heard.append(1))
    taken.clear()
    listening = Decoder(model)
    assert torch.equal(listening.generate(ids, 12), wanted)
    assert (listening.why, listening.fused, listening.why_modules) == (None, False, "lm_head has a hook")
    assert heard
    assert not taken
    # Who came to listen since a step was captured hears the next generation, too, and who left is not waited for.
    assert torch.equal(decoder.generate(ids, 12), wanted)
    assert (decoder.fused, decoder.why_modules) == (False, "lm_head has a hook")
    assert not taken
    handle.remove()
    decoder.generate(ids, 12)
    assert decoder.fused
    assert not Decoder(model, graph=False).fused


def test_what_is_not_known_is_stepped_by_its_modules_with_a_word(tmp_path: Path) -> None:
    """Each thing that `chain.token` would compute otherwise, put into a model that is known."""
    from microscale.integrations.hf.chain_parts import refuse_parts

    def changed(change: Callable[[Any], Any], make: Callable[[Path], Any] = qwen) -> str:
        model = make(tmp_path)
        assert refuse_parts(model) is None
        change(model)
        return str(refuse_parts(model))

    class Other(torch.nn.Linear):
        pass

    def attribute(path: str, value: Any) -> Callable[[Any], None]:
        def change(model: Any) -> None:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, value)

        return change

    first = "model.layers.0"
    assert changed(attribute(f"{first}.self_attn.o_proj", Other(64, 64))) == (
        f"{first}.self_attn.o_proj is Other, which is not known"
    )
    assert "GELU, which is not known" in changed(attribute(f"{first}.mlp.experts.act_fn", torch.nn.GELU()))
    assert changed(attribute(f"{first}.input_layernorm.forward", lambda x: x)) == (
        f"{first}.input_layernorm has a forward of its own"
    )
    assert "not all of its norms" in changed(lambda model: model.model.norm.half())
    assert "turns a part of each head" in changed(attribute("model.rotary_emb.inv_freq", torch.ones(4)))
    assert "looks at a sequence's length" in changed(attribute("model.rotary_emb.rope_type", "dynamic"))
    assert "queries and keys differ" in changed(attribute(f"{first}.self_attn.k_norm.variance_epsilon", 0.1))
    assert changed(lambda model: model.train()) == "it is in training mode"
    with torch.autocast(DEVICE, torch.bfloat16):
        assert refuse_parts(qwen(tmp_path)) == "autocast chooses dtypes, and the chain has one"
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        try:
            assert refuse_parts(qwen(tmp_path)) == "a hook listens to all modules"
        finally:
            handle.remove()
    assert changed(lambda model: model.set_attn_implementation("flex_attention"), mistral) == (
        "its attention is flex_attention, and not sdpa or eager"
    )
    assert changed(_as_bloom) == (
        "bloom is none of gpt_oss, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe"
    )


def _as_bloom(model: Any) -> None:
    model.config = BloomConfig()
