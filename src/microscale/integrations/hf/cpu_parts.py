"""What a model's token is made of, if it is what `cpu_chain` knows: plain records of its modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microscale.backends.cpu_rules import refuse_device
from microscale.backends.dense_rules import CORE, HOST
from microscale.backends.token_rules import refuse_layer
from microscale.dense import DenseModule
from microscale.formats import activation_word
from microscale.integrations.hf.architectures import Kind
from microscale.integrations.hf.cpu_models import GATES, UnknownError, kind_of, refuse_modules, sparse
from microscale.integrations.hf.in_place import replacement
from microscale.integrations.hf.linears import dense_class
from microscale.integrations.hf.listeners import hooks_of, hooks_of_all
from microscale.machine import detect
from microscale.nn import QuantLinear, runner_of
from microscale.quant_experts import QuantExperts


@dataclass(frozen=True)
class Norm:
    """y = w * x / rms(x); `twice`: rounded before w multiplies, too."""

    weight: Tensor
    epsilon: float
    twice: bool


@dataclass(frozen=True)
class Product:
    """[M, K] -> [M, N]: a weight as it lies, or one that the core has packed."""

    weight: Any  # Tensor [N, K], or cpu.Packed
    bias: Tensor | None
    n: int
    k: int

    @property
    def packed(self) -> bool:
        """The core has packed it."""
        return not isinstance(self.weight, Tensor)


@dataclass(frozen=True)
class Experts:
    """A router and its experts."""

    router: Product
    rule: str  # of `cpu_core.ROUTERS`
    renormalize: bool
    shares: torch.dtype  # that their weights are rounded to
    top_k: int
    runner: QuantExperts


@dataclass(frozen=True)
class Mlp:
    """down(activation(gate) * up)."""

    gate: Product
    up: Product
    down: Product
    activation: str


@dataclass(frozen=True)
class Layer:
    """One layer; norms of queries and keys, and sinks, where there are any."""

    first: Norm
    q: Product
    k: Product
    v: Product
    o: Product
    q_norm: Norm | None
    k_norm: Norm | None
    sinks: Tensor | None
    width: int
    scale: float
    second: Norm
    mlp: Mlp | Experts


@dataclass(frozen=True)
class Parts:
    """A model."""

    dtype: torch.dtype
    embedding: Tensor
    rotary: Any
    layers: list[Layer]
    norm: Norm
    head: Product


def parts_of(model: Any) -> Parts | str:
    """A model's parts, its layers placed; or why a token of it is not what `cpu_chain` computes, in a sentence."""
    why = refuse_device("cpu", bool(detect().core)) or refuse_modules(model) or _refuse_moment(model)
    if why is not None:
        return why
    try:
        return _parts(model)
    except UnknownError as unknown:
        return str(unknown)


def _refuse_moment(model: Any) -> str | None:
    """Who looks on, or changes how torch computes, while a model is in use."""
    if model._compiled_call_impl is not None:
        return "torch.compile has it"
    listener = next(_listeners(model), None)
    if listener is not None:
        return f"a hook listens to {listener}"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a mode sees torch's operators"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses dtypes, and the chain has one"
    return None


def _parts(model: Any) -> Parts:
    kind, body = kind_of(model), model.model
    assert kind is not None, "its modules are known"
    table = _readable(body.embed_tokens.weight)
    read = _Reader(kind, table.dtype)
    layers = [read.layer(layer) for layer in body.layers]
    return Parts(
        table.dtype, table, body.rotary_emb, layers, read.norm(body.norm), read.product(model.lm_head)
    )


class _Reader:
    """Modules of one architecture, in one dtype, all of them known, to records."""

    def __init__(self, kind: Kind, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype

    def layer(self, module: Any) -> Layer:
        at, heads = module.self_attn, self.kind.head_norms
        return Layer(
            first=self.norm(module.input_layernorm),
            q=self.product(at.q_proj),
            k=self.product(at.k_proj),
            v=self.product(at.v_proj),
            o=self.product(at.o_proj),
            q_norm=self.norm(at.q_norm) if heads else None,
            k_norm=self.norm(at.k_norm) if heads else None,
            sinks=_readable(at.sinks) if self.kind.sinks else None,
            width=at.head_dim,
            scale=at.scaling,
            second=self.norm(module.post_attention_layernorm),
            mlp=self.experts(module.mlp) if sparse(module.mlp, self.kind) else self.mlp(module.mlp),
        )

    def mlp(self, module: Any) -> Mlp:
        gate, up, down = (self.product(m) for m in (module.gate_proj, module.up_proj, module.down_proj))
        return Mlp(gate, up, down, GATES[module.config.hidden_act])

    def experts(self, module: Any) -> Experts:
        router, runner = getattr(module, self.kind.router), runner_of(module.experts)
        assert isinstance(runner, QuantExperts), "its modules are known"
        placement = runner.placed(self.dtype, router.weight.device)
        _by_core("its experts", placement.choice.backend.name, activation_word(runner.act))
        if dense_class(router) is not None:
            _by_core("its router", _runs(router))
        w, bias = _readable(router.weight), getattr(router, "bias", None)
        product = Product(w, None if bias is None else _readable(bias), *w.shape)
        renormalize, shares = getattr(router, "norm_topk_prob", True), self.kind.shares or self.dtype
        return Experts(product, self.kind.rule, bool(renormalize), shares, router.top_k, runner)

    def norm(self, module: Any) -> Norm:
        return Norm(_readable(module.weight), module.variance_epsilon, self.kind.twice)

    def product(self, module: Any) -> Product:
        if isinstance(module, QuantLinear):
            placement = module.placed(self.dtype)
            _by_core("a linear in it", placement.choice.backend.name, activation_word(module.act))
            (packed,) = placement.packed
            return Product(packed, module.bias, module.out_features, module.in_features)
        _by_core(f"a {type(module).__name__} in it", _runs(module))
        w, bias = _readable(module.weight), module.bias
        return Product(w, None if bias is None else _readable(bias), *w.shape)


def _readable(t: Tensor) -> Tensor:
    """t, whose numbers are at its address, one behind the other."""
    if not t.is_cpu or not t.is_contiguous():
        raise UnknownError(f"a weight is on {t.device}" if not t.is_cpu else "a weight is not contiguous")
    return t


def _runs(dense: Any) -> str:
    """Who multiplies a few rows by a weight that is not quantised."""
    return CORE.name if isinstance(dense, DenseModule) and dense.rows else HOST


def _by_core(layer: str, backend: str, act: str = "a16") -> None:
    why = refuse_layer(layer, backend, act)
    if why is not None:
        raise UnknownError(why)


def _listeners(model: nn.Module) -> Iterator[str]:
    """Modules whose calls somebody else sees, and which a chain would not make."""
    if hooks_of_all():
        yield "all modules"
    for name, module in model.named_modules():
        if hooks_of(module) or replacement(module) is not None:
            yield name or "the model"
