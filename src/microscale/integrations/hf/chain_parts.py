"""Which models `chain.token` computes a token of: those whose every module is one that is known, and nobody listens in.

A model that is not known here is stepped by its own modules, and a sentence says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from microscale.canary import DTYPES
from microscale.integrations.hf.architectures import KINDS, Kind
from microscale.integrations.hf.attention import refuse_triton, triton_steps
from microscale.integrations.hf.in_place import replacement
from microscale.integrations.hf.listeners import hooks_of, hooks_of_all
from microscale.integrations.hf.step_cache import StepCache, moves
from microscale.nn import QuantLinear

_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU, QuantLinear)
_OURS = ("DenseGptOssRMSNorm", "StepGptOssRouter")  # what `gpt_oss.take_steps` makes of gpt-oss' own
_DENSE = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_SPARSE = ("SparseMoeBlock", "TopKRouter", "Experts")


def chain_of(model: Any) -> tuple[Callable[[Tensor, StepCache], Any] | None, str | None]:
    """`token` of a model, or None and why it would not be what the model computes, or no kernel of ours runs."""
    from microscale.integrations.hf import chain

    why = refuse(model)
    if why is not None:
        return None, why
    kind = KINDS[model.config.model_type]
    return lambda ids, cache: chain.token(kind, model, ids, cache), None


def refuse(model: Any) -> str | None:
    """None, or why a token of a model is not a chain of kernels, in a sentence."""
    if not triton_steps(model.device):
        return refuse_triton(model.device)
    return refuse_parts(model)


def refuse_parts(model: Any) -> str | None:
    """None, or what of a model a chain of kernels does not know, wherever it is."""
    word = model.config.model_type
    kind = KINDS.get(word)
    if kind is None:
        return f"{word} is none of {', '.join(KINDS)}"
    if model.config._attn_implementation not in kind.attention:
        return f"its attention is {model.config._attn_implementation}, and not {' or '.join(kind.attention)}"
    if model.training:
        return "it is in training mode"
    if model.device.type != "meta" and torch.is_autocast_enabled(model.device.type):
        return "autocast chooses dtypes, and the chain has one"
    if hooks_of_all():
        return "a hook listens to all modules"
    if type(model).__name__ != f"{kind.prefix}ForCausalLM":
        return f"it is {type(model).__name__}, and not {kind.prefix}ForCausalLM"
    for name, module in model.named_modules():
        if not _known(module, kind, word):
            return f"{name} is {type(module).__name__}, which is not known"
        if hooks_of(module):
            return f"{name or 'the model'} has a hook"
        if replacement(module) is not None:
            return f"{name or 'the model'} has a forward of its own"
    return _refuse_numbers(model, kind)


def _known(module: nn.Module, kind: Kind, word: str) -> bool:
    made = type(module)
    if made in _PLAIN:
        return True
    if made.__module__ == "transformers.activations":
        return made.__name__ == "SiLUActivation"
    if made.__module__ == f"transformers.models.{word}.modeling_{word}":
        return made.__name__.removeprefix(kind.prefix) in _DENSE + _SPARSE
    return made.__module__ == "microscale.integrations.hf.gpt_oss" and made.__name__ in _OURS


def _refuse_numbers(model: Any, kind: Kind) -> str | None:
    """What the kinds of its modules do not say."""
    body, rotary = model.model, model.model.rotary_emb
    if moves(rotary):
        return f"its rotary embedding is {rotary.rope_type}, which looks at a sequence's length"
    dtype = body.embed_tokens.weight.dtype
    if dtype not in DTYPES.values():
        return f"its activations are {dtype}"
    attention = [layer.self_attn for layer in body.layers]
    read = [getattr(layer.mlp, kind.router).weight for layer in body.layers if hasattr(layer.mlp, "experts")]
    if kind.sinks:
        read += [at.sinks for at in attention]
    if kind.twice:  # else norms round once, to what they are given, whatever their weights are
        read += [module.weight for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    if any(t.dtype is not dtype for t in read):
        return f"not all of its norms, sinks and routers are {dtype}"
    if any(2 * rotary.inv_freq.numel() != at.head_dim for at in attention):
        return "its rotary embedding turns a part of each head"
    if kind.head_norms and any(at.q_norm.variance_epsilon != at.k_norm.variance_epsilon for at in attention):
        return "its norms of queries and keys differ"
    return None
