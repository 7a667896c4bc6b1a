"""What a model's token is made of, if it is what `cpu_chain` knows: plain records of its modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from microscale.canary import DTYPE_WORDS
from microscale.dense import DenseLinear, DenseModule
from microscale.integrations.hf.architectures import KINDS, Kind
from microscale.integrations.hf.in_place import replacement
from microscale.integrations.hf.listeners import hooks_of, hooks_of_all
from microscale.integrations.hf.step_cache import layer_kinds, moves
from microscale.machine import detect
from microscale.nn import QuantExperts, QuantLinear, runner_of

FAMILIES = {kind.prefix: kind for kind in KINDS.values()}
# What the core makes of modules of transformers', or they are PyTorch's.
_OURS = {"GptOssTopKRouter": "DenseGptOssRouter", "GptOssRMSNorm": "DenseGptOssRMSNorm"}
GATES = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}  # transformers' words, and ours
_ROOTS = ("transformers.models.", "microscale.", "torch.")  # modules whose classes and methods are known


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


class _UnknownError(Exception):
    """Its text says what about a model `parts_of` does not know."""


def parts_of(model: Any) -> Parts | str:
    """A model's parts, its layers placed; or why a token of it is not what `cpu_chain` computes, in a sentence."""
    try:
        return _parts(model)
    except _UnknownError as unknown:
        return str(unknown)


def _parts(model: Any) -> Parts:
    if not detect().core:
        raise _UnknownError(detect().core_missing)
    family = type(model).__name__.removesuffix("ForCausalLM")
    if family not in FAMILIES or not _made_by(model, f"{family}ForCausalLM"):
        raise _UnknownError(f"{type(model).__name__} is not an architecture that the core has a chain for")
    _known(model, f"{family}ForCausalLM")
    if model._compiled_call_impl is not None:
        raise _UnknownError("torch.compile has it")
    attention = model.config._attn_implementation
    if attention != FAMILIES[family].attention[0]:
        raise _UnknownError(f"its attention is {attention}, which the chain would not be")
    listener = next(_listeners(model), None)
    if listener is not None:
        raise _UnknownError(f"a hook listens to {listener}")
    if torch._C._len_torch_dispatch_stack() > 0:
        raise _UnknownError("a mode sees torch's operators")
    if torch.is_autocast_enabled("cpu"):
        raise _UnknownError("autocast chooses dtypes, and the chain has one")
    if model.training:
        raise _UnknownError("it is in training mode")
    body = _known(model.model, f"{family}Model")
    rotary = _known(body.rotary_emb, f"{family}RotaryEmbedding")
    if moves(rotary):
        raise _UnknownError(f"its rotary embedding is {rotary.rope_type}, which changes on the way")
    table = _known(body.embed_tokens, "Embedding").weight
    if table.dtype not in DTYPE_WORDS:
        raise _UnknownError(f"it computes in {table.dtype}")
    read = _Reader(FAMILIES[family], table.dtype)
    layers = [read.layer(layer) for layer in body.layers]
    config = model.config.get_text_config(decoder=True)
    count, places = config.num_hidden_layers, [layer.self_attn.layer_idx for layer in body.layers]
    if places != list(range(count)) or len(layer_kinds(config)) != count:
        raise _UnknownError("its layers are not those of its config, in their order")
    return Parts(
        table.dtype, read.tensor(table), rotary, layers, read.norm(body.norm), read.product(model.lm_head)
    )


class _Reader:
    """Modules of one architecture, in one dtype, to records."""

    def __init__(self, kind: Kind, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype

    def known(self, module: Any, name: str) -> Any:
        """A module, if it is what the architecture calls so."""
        return _known(module, f"{self.kind.prefix}{name}")

    def layer(self, module: Any) -> Layer:
        self.known(module, "DecoderLayer")
        at = self.known(module.self_attn, "Attention")
        q_norm, k_norm = (
            self.norm(norm) if self.kind.head_norms else None
            for norm in (getattr(at, name, None) for name in ("q_norm", "k_norm"))
        )
        if q_norm and k_norm and _same(q_norm) != _same(k_norm):
            raise _UnknownError("queries and keys have norms of two kinds")
        return Layer(
            first=self.norm(module.input_layernorm),
            q=self.product(at.q_proj),
            k=self.product(at.k_proj),
            v=self.product(at.v_proj),
            o=self.product(at.o_proj),
            q_norm=q_norm,
            k_norm=k_norm,
            sinks=self.tensor(at.sinks) if self.kind.sinks else None,
            width=at.head_dim,
            scale=at.scaling,
            second=self.norm(module.post_attention_layernorm),
            mlp=self.mlp(module.mlp),
        )

    def mlp(self, module: Any) -> Mlp | Experts:
        kind = self.kind
        if _made_by(module, f"{kind.prefix}{kind.sparse}"):
            self.known(module, kind.sparse)
            name = f"{kind.prefix}TopKRouter"
            return self.experts(_known(getattr(module, kind.router), _OURS.get(name, name)), module.experts)
        self.known(module, "MLP")
        activation = GATES.get(module.config.hidden_act)
        if activation is None:
            raise _UnknownError(f"its activation is {module.config.hidden_act}")
        if type(module.act_fn) is not type(ACT2FN[module.config.hidden_act]):
            raise _UnknownError(f"a {type(module.act_fn).__name__} stands where its activation would")
        gate, up, down = (self.product(m) for m in (module.gate_proj, module.up_proj, module.down_proj))
        return Mlp(gate, up, down, activation)

    def experts(self, router: Any, module: Any) -> Experts:
        runner = runner_of(module)
        if not isinstance(runner, QuantExperts):
            raise _UnknownError("its experts are not in a block format")
        placement = runner.placement or runner.place(self.dtype)
        _by_core(placement.choice.backend.name, runner.act, "experts")
        if isinstance(router, DenseModule) and not router.rows:
            raise _UnknownError("its router is PyTorch's")
        w, bias = self.tensor(router.weight), getattr(router, "bias", None)
        product = Product(w, None if bias is None else self.tensor(bias), *w.shape)
        renormalize, shares = getattr(router, "norm_topk_prob", True), self.kind.shares or self.dtype
        return Experts(product, self.kind.rule, bool(renormalize), shares, router.top_k, runner)

    def norm(self, module: Any) -> Norm:
        name = f"{self.kind.prefix}RMSNorm"
        _known(module, name if _made_by(module, name) else _OURS.get(name, name))
        w = _readable(module.weight)
        if w.dtype not in DTYPE_WORDS:
            raise _UnknownError(f"a norm's weight is {w.dtype}")
        return Norm(w, module.variance_epsilon, self.kind.twice)

    def product(self, module: Any) -> Product:
        for kind in (QuantLinear, DenseLinear):
            if isinstance(module, kind) and type(module).forward is not kind.forward:
                raise _UnknownError(f"a {type(module).__name__} in it has a forward of its own")
        if isinstance(module, QuantLinear):
            placement = module.placement or module.place(self.dtype)
            _by_core(placement.choice.backend.name, module.act, "a linear")
            (packed,) = placement.packed
            return Product(packed, module.bias, module.out_features, module.in_features)
        if not isinstance(module, DenseLinear) or not module.rows:
            raise _UnknownError(f"a {type(module).__name__} in it is PyTorch's")
        w, bias = module.weight, module.bias
        return Product(self.tensor(w), None if bias is None else self.tensor(bias), *w.shape)

    def tensor(self, t: Tensor) -> Tensor:
        if t.dtype is not self.dtype:
            raise _UnknownError(f"a weight is {t.dtype}, and the chain is {self.dtype}")
        return _readable(t)


def _readable(t: Tensor) -> Tensor:
    """t, whose numbers are at its address, one behind the other."""
    if type(t) not in (Tensor, nn.Parameter):
        raise _UnknownError(f"a weight is a {type(t).__name__}, which computes in a way of its own")
    if not t.is_cpu or not t.is_contiguous():
        raise _UnknownError(f"a weight is on {t.device}" if not t.is_cpu else "a weight is not contiguous")
    return t


def _same(norm: Norm) -> tuple[torch.dtype, float, bool]:
    return norm.weight.dtype, norm.epsilon, norm.twice


def _by_core(backend: str, act: Any, what: str) -> None:
    if backend != "cpu":
        raise _UnknownError(f"{what} by {backend}, not by the core")
    if act is not None:
        raise _UnknownError(f"activations are quantised to {act.name}")


def _made_by(module: Any, name: str) -> bool:
    kind = type(module)
    return kind.__name__ == name and kind.__module__.startswith(_ROOTS)


def _known(module: Any, name: str) -> Any:
    if not _made_by(module, name):
        raise _UnknownError(f"a {type(module).__name__} stands where a {name} would")
    source = type(module).forward.__module__
    if not source.startswith(_ROOTS):
        raise _UnknownError(f"{name} has the forward of {source}")
    return module


def _listeners(model: nn.Module) -> Iterator[str]:
    """Modules whose calls somebody else sees, and which a chain would not make."""
    if hooks_of_all():
        yield "all modules"
    for name, module in model.named_modules():
        if hooks_of(module) or replacement(module) is not None:
            yield name or "the model"
