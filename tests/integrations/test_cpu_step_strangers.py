"""Changed models, of which a chain would compute something else: their modules do, and a sentence says why."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cpu_step import eager, gpt_oss, llama, mistral, packed_qwen3, prompt, qwen3
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import microscale
from microscale.dense import DenseLinear
from microscale.integrations.hf import cpu_step
from microscale.integrations.hf.cpu_parts import Parts
from microscale.integrations.hf.graph import Decoder


class Wrapped(torch.Tensor):
    """A tensor whose numbers are elsewhere."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(t: Any) -> Any:
            return t.inner if isinstance(t, Wrapped) else t

        return func(*map(inner, args), **{name: inner(t) for name, t in (kwargs or {}).items()})


class Tripled(DenseLinear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input)


def other_tensor(model: Any) -> None:
    q = model.model.layers[0].self_attn.q_proj
    q._parameters["weight"] = Wrapped(q.weight.detach())


def other_linear(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.__class__ = Tripled


def other_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.Tanh()


def other_order(model: Any) -> None:
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.detach().t().contiguous().t())


def other_forward(model: Any) -> None:
    before = model.forward

    @functools.wraps(before)
    def forward(*args: Any, **kwargs: Any) -> Any:
        found = before(*args, **kwargs)
        found.logits = -found.logits
        return found

    model.forward = forward


def compiled(model: Any) -> None:
    model.compile(backend="eager")


def fewer_layers(model: Any) -> None:
    """transformers runs the first of them."""
    model.config.num_hidden_layers = 2


def layers_in_another_order(model: Any) -> None:
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[1], layers[0], layers[2]])


STRANGERS = [
    (fewer_layers, "its layers are not those of its config, in their order"),
    (layers_in_another_order, "its layers are not those of its config, in their order"),
    (other_tensor, "a weight is a Wrapped, which computes in a way of its own"),
    (other_linear, "a Tripled in it has a forward of its own"),
    (other_activation, "a Tanh stands where its activation would"),
    (other_order, "a weight is not contiguous"),
    (other_forward, "a hook listens to the model"),
    (compiled, "torch.compile has it"),
]


@pytest.mark.parametrize(("change", "why"), STRANGERS, ids=lambda p: getattr(p, "__name__", ""))
def test_a_changed_model_goes_by_its_modules(tmp_path: Path, change: Callable[[Any], None], why: str) -> None:
    model, ids = llama(tmp_path), prompt(2, 5)
    change(model)
    decoder = Decoder(model)
    assert torch.equal(decoder.generate(ids, 12), eager(model, ids, 12))
    assert (decoder.why, decoder.fused) == (why, False)


def test_norms_of_queries_and_keys_that_differ(tmp_path: Path) -> None:
    model, ids = qwen3(tmp_path), prompt(1, 5)
    model.model.layers[2].self_attn.k_norm.variance_epsilon = 3.0
    decoder = Decoder(model)
    assert torch.equal(decoder.generate(ids, 12), eager(model, ids, 12))
    assert decoder.why == "queries and keys have norms of two kinds"


def test_a_class_with_another_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = llama(tmp_path), LlamaAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found, *rest = before(self, *args, **kwargs)
        return 2 * found, *rest

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    assert cpu_step.parts_for(model, 1) == f"LlamaAttention has the forward of {__name__}"


def test_a_hook_of_all_modules_is_called(tmp_path: Path) -> None:
    model, heard = llama(tmp_path), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(module))
    try:
        decoder = Decoder(model)
        decoder.generate(prompt(1, 5), 6)
    finally:
        handle.remove()
    assert decoder.why == "a hook listens to all modules"
    assert sum(module is model.model.norm for module in heard) == 6


def test_operators_are_watched(tmp_path: Path) -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model = llama(tmp_path)
    with Watching():
        assert cpu_step.parts_for(model, 1) == "a mode sees torch's operators"
    assert isinstance(cpu_step.parts_for(model, 1), Parts)


def test_a_weight_of_parametrize_is_that_of_the_moment(tmp_path: Path) -> None:
    class Negative(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return -w

    model, ids = llama(tmp_path), prompt(1, 5)
    parametrize.register_parametrization(model.model.layers[0].self_attn.q_proj, "weight", Negative())
    decoder = Decoder(model)
    assert torch.equal(decoder.generate(ids, 12), eager(model, ids, 12))
    assert decoder.fused


def test_a_rotary_embedding_is_that_of_the_moment(tmp_path: Path) -> None:
    model, ids = llama(tmp_path), prompt(1, 9)
    decoder = Decoder(model)
    decoder.generate(ids, 20)
    cache, rope = decoder._cache, {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=rope)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    assert torch.equal(decoder.generate(ids, 20), eager(model, ids, 20))
    assert decoder.fused
    assert decoder._cache is cache


def test_a_window_is_that_of_the_moment(tmp_path: Path) -> None:
    model, ids = mistral(tmp_path), prompt(1, 20)
    decoder = Decoder(model)
    for window in (8, 4, None, 30):
        model.config.sliding_window = window
        assert torch.equal(decoder.generate(ids, 20), eager(model, ids, 20)), window
        assert decoder.fused


def test_heads_are_those_of_the_moment(tmp_path: Path) -> None:
    """Two key heads, then one of each layer: the cache of before is for two."""
    model, ids = llama(tmp_path), prompt(2, 5)
    decoder = Decoder(model)
    decoder.generate(ids, 10)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.num_key_value_groups = 4
        for linear in (attention.k_proj, attention.v_proj):
            linear.weight = nn.Parameter(linear.weight.detach()[:16].clone())
            linear.out_features = 16
    assert torch.equal(decoder.generate(ids, 10), eager(model, ids, 10))
    assert decoder.fused


def test_weights_that_were_replaced_are_let_go(tmp_path: Path) -> None:
    import gc
    import weakref

    model = packed_qwen3(tmp_path)
    decoder = Decoder(model)
    decoder.generate(prompt(1, 5), 5)
    assert decoder.fused
    buffer = weakref.ref(model.model.layers[0].self_attn.q_proj.placement.packed[0].buffer)
    assert buffer() is not None
    microscale.requantize(model, "mxfp4")
    gc.collect()
    assert buffer() is None, "a decoder that generates nothing keeps the weights of before"


def padded() -> Iterator[tuple[dict[str, Any], bool]]:
    yield {}, True  # 0 is the config's padding token
    yield {"eos_token_id": 0}, False  # transformers then takes it for an end
    yield {"eos_token_id": [3, 0]}, False
    yield {"pad_token_id": 7}, False
    yield {"pad_token_id": 5}, True


@pytest.mark.parametrize(("arguments", "seen"), list(padded()))
def test_a_padding_token_in_a_prompt_without_a_mask(
    tmp_path: Path, arguments: dict[str, Any], seen: bool
) -> None:
    """`generate` makes a mask of it, which steps would not see."""
    model, ids = llama(tmp_path), torch.randint(8, 160, (2, 8))
    ids[0, :2], ids[1, 4] = arguments.get("pad_token_id", 0) if seen else 0, 5
    if seen and "pad_token_id" not in arguments:
        ids[1, 4] = 0
    decoder = Decoder(model)
    found = decoder.generate(ids, 20, **arguments)
    assert torch.equal(found, Decoder(model, graph=False).generate(ids, 20, **arguments))
    assert decoder.fused is not seen
    assert decoder.why == (
        "prompts are padded, and a captured step takes sequences of one length" if seen else None
    )


def test_what_torch_compile_returns_is_said(tmp_path: Path) -> None:
    decoder = Decoder(torch.compile(llama(tmp_path), backend="eager"))
    assert decoder.generate(prompt(1, 5), 3).shape == (1, 8)
    assert "in a way of its own" in str(decoder.why)


def test_tensors_may_be_made_elsewhere_by_default(tmp_path: Path) -> None:
    """Then none of those whose addresses the core gets may be."""
    model, ids = gpt_oss(tmp_path), prompt(1, 9)
    wanted = steps_of(model, ids)
    torch.set_default_device("meta")
    try:
        found = steps_of(model, ids)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, wanted)


def steps_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Over a cache that grows."""
    from test_cpu_step import step_behind

    step = step_behind(model, ids[:, :4], 6)
    with torch.no_grad():
        return torch.cat([step(ids[:, t : t + 1]).logits.clone() for t in range(4, 9)], dim=1)
