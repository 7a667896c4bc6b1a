"""Which models have tokens that `cpu_chain` computes, by their modules: of one without weights, and of a loaded one.

Who runs its layers is `backends.token_rules`' to say, and what only a model in use shows (hooks, modes, weights that do
not lie in memory as they should) is `cpu_parts`'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from microscale.canary import DTYPE_WORDS
from microscale.dense import DenseLinear
from microscale.integrations.hf.architectures import KINDS, Kind
from microscale.integrations.hf.step_cache import layer_kinds, moves
from microscale.nn import QuantLinear, runner_of
from microscale.quant_experts import QuantExperts

GATES = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # transformers' words, and ours
_FAMILIES = {kind.prefix: kind for kind in KINDS.values()}
# What loading makes of modules of transformers', where the core runs them.
_OURS = {"GptOssTopKRouter": "DenseGptOssRouter", "GptOssRMSNorm": "DenseGptOssRMSNorm"}
_ROOTS = ("transformers.models.", "microscale.", "torch.")  # modules whose classes and methods are known


class UnknownError(Exception):
    """Its text says what about a model the chain does not know."""


def refuse_modules(model: Any) -> str | None:
    """None, or what of a model, wherever it is, makes a token of it something else than `cpu_chain` computes."""
    try:
        _check(model)
    except UnknownError as unknown:
        return str(unknown)
    return None


def kind_of(model: Any) -> Kind | None:
    """The architecture that a model is of, if there is a chain for it."""
    family = type(model).__name__.removesuffix("ForCausalLM")
    return _FAMILIES.get(family) if _made_by(model, f"{family}ForCausalLM") else None


def sparse(mlp: Any, kind: Kind) -> bool:
    """Whether that is experts and their router, and not an MLP."""
    return _made_by(mlp, f"{kind.prefix}{kind.sparse}")


def _check(model: Any) -> None:
    kind = kind_of(model)
    if kind is None:
        raise UnknownError(f"{type(model).__name__} is not an architecture that the core has a chain for")
    check = _Check(kind)
    check.known(model, "ForCausalLM")
    attention = model.config._attn_implementation
    if attention != kind.attention[0]:
        raise UnknownError(f"its attention is {attention}, which the chain would not be")
    if model.training:
        raise UnknownError("it is in training mode")
    body = model.model
    check.known(body, "Model")
    rotary = body.rotary_emb
    check.known(rotary, "RotaryEmbedding")
    if moves(rotary):
        raise UnknownError(f"its rotary embedding is {rotary.rope_type}, which changes on the way")
    _known(body.embed_tokens, "Embedding")
    check.dtype = body.embed_tokens.weight.dtype
    if check.dtype not in DTYPE_WORDS:
        raise UnknownError(f"it computes in {check.dtype}")
    for layer in body.layers:
        check.layer(layer)
    config = model.config.get_text_config(decoder=True)
    count, places = config.num_hidden_layers, [layer.self_attn.layer_idx for layer in body.layers]
    if places != list(range(count)) or len(layer_kinds(config)) != count:
        raise UnknownError("its layers are not those of its config, in their order")
    check.tensor(body.embed_tokens.weight)
    check.norm(body.norm)
    check.product(model.lm_head)


class _Check:
    """Modules of one architecture, in one dtype. Each method raises for one that is not what it should be."""

    dtype: torch.dtype

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def known(self, module: Any, name: str) -> None:
        """It is what the architecture calls so."""
        _known(module, f"{self.kind.prefix}{name}")

    def layer(self, module: Any) -> None:
        self.known(module, "DecoderLayer")
        at = module.self_attn
        self.known(at, "Attention")
        if self.kind.head_norms:
            for norm in (at.q_norm, at.k_norm):
                self.norm(norm)
            if _same(at.q_norm) != _same(at.k_norm):
                raise UnknownError("queries and keys have norms of two kinds")
        self.norm(module.input_layernorm)
        for linear in (at.q_proj, at.k_proj, at.v_proj, at.o_proj):
            self.product(linear)
        if self.kind.sinks:
            self.tensor(at.sinks)
        self.norm(module.post_attention_layernorm)
        if sparse(module.mlp, self.kind):
            self.experts(module.mlp)
        else:
            self.mlp(module.mlp)

    def mlp(self, module: Any) -> None:
        self.known(module, "MLP")
        word = module.config.hidden_act
        if word not in GATES:
            raise UnknownError(f"its activation is {word}")
        if type(module.act_fn) is not type(ACT2FN[word]):
            raise UnknownError(f"a {type(module.act_fn).__name__} stands where its activation would")
        for linear in (module.gate_proj, module.up_proj, module.down_proj):
            self.product(linear)

    def experts(self, module: Any) -> None:
        self.known(module, self.kind.sparse)
        router = getattr(module, self.kind.router)
        _known(router, f"{self.kind.prefix}TopKRouter")
        if not isinstance(runner_of(module.experts), QuantExperts):
            raise UnknownError("its experts are not in a block format")
        self.tensor(router.weight)
        if getattr(router, "bias", None) is not None:
            self.tensor(router.bias)

    def norm(self, module: Any) -> None:
        _known(module, f"{self.kind.prefix}RMSNorm")
        _plain(module.weight)
        if module.weight.dtype not in DTYPE_WORDS:
            raise UnknownError(f"a norm's weight is {module.weight.dtype}")

    def product(self, module: Any) -> None:
        made = type(module)
        for ours in (QuantLinear, DenseLinear):
            if isinstance(module, ours) and made.forward is not ours.forward:
                raise UnknownError(f"a {made.__name__} in it has a forward of its own")
        if isinstance(module, QuantLinear):
            return
        if made is not nn.Linear and not isinstance(module, DenseLinear):
            raise UnknownError(f"a {made.__name__} in it is PyTorch's")
        self.tensor(module.weight)
        if module.bias is not None:
            self.tensor(module.bias)

    def tensor(self, t: Tensor) -> None:
        if t.dtype is not self.dtype:
            raise UnknownError(f"a weight is {t.dtype}, and the chain is {self.dtype}")
        _plain(t)


def _plain(t: Tensor) -> None:
    if type(t) not in (Tensor, nn.Parameter):
        raise UnknownError(f"a weight is a {type(t).__name__}, which computes in a way of its own")


def _same(norm: Any) -> tuple[torch.dtype, float]:
    return norm.weight.dtype, norm.variance_epsilon


def _made_by(module: Any, name: str) -> bool:
    kind = type(module)
    return kind.__name__ == name and kind.__module__.startswith(_ROOTS)


def _known(module: Any, name: str) -> None:
    """It is of transformers' class of that name, or what loading makes of it."""
    ours = _OURS.get(name)
    if ours is not None and _made_by(module, ours):
        name = ours
    if not _made_by(module, name):
        raise UnknownError(f"a {type(module).__name__} stands where a {name} would")
    source = type(module).forward.__module__
    if not source.startswith(_ROOTS):
        raise UnknownError(f"{name} has the forward of {source}")
