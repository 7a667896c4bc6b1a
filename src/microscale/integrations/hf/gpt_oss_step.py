"""A token of gpt-oss through all of its layers in few kernels: what `step.Step` captures instead of the forward.

A layer is eleven kernels of ours. Each adds what the one before it gave to the stream as it takes the norm of it, and
on Hopper each is launched before the one ahead has ended (see `backends.triton.small`). The slow twin is transformers'
forward of the same token over the same cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssDecoderLayer,
    GptOssExperts,
    GptOssForCausalLM,
    GptOssMLP,
    GptOssModel,
)

from microscale.canary import DTYPES
from microscale.integrations.hf.attention import NAME, triton_steps
from microscale.integrations.hf.gpt_oss import DenseGptOssRMSNorm, StepGptOssRouter
from microscale.integrations.hf.step_cache import StepCache

_PARTS = (
    GptOssModel,
    GptOssDecoderLayer,
    GptOssAttention,
    GptOssMLP,
    GptOssExperts,
    DenseGptOssRMSNorm,
    StepGptOssRouter,
)
_MOVING = ("dynamic", "longrope")  # kinds of rotary embedding that look at how long a sequence has become


def step_of(model: Any) -> Callable[[Tensor, StepCache], Any] | None:
    """`token` of a model, or None where it would not be what the model computes, or no kernel of ours runs."""
    if type(model) is not GptOssForCausalLM or model.config._attn_implementation != NAME:
        return None
    if not triton_steps(model.device) or not _plain(model):
        return None
    return lambda ids, cache: token(model, ids, cache)


def _plain(model: Any) -> bool:
    """Whether a model is made of what `token` knows, and nobody listens in."""
    if any(word in model.model.rotary_emb.rope_type for word in _MOVING):
        return False
    known = {type(module) for module in model.modules() if type(module).__name__.find("GptOss") >= 0}
    known -= {GptOssForCausalLM, type(model.model.rotary_emb)}
    if known != set(_PARTS):
        return False
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' own record what it is asked for, which a step is not.
        if any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks):
            return False
        if "forward" in module.__dict__:
            return False
    dtype = model.model.embed_tokens.weight.dtype
    sinks = (layer.self_attn.sinks for layer in model.model.layers)
    routers = (layer.mlp.router.weight for layer in model.model.layers)
    return dtype in DTYPES.values() and all(t.dtype is dtype for t in (*sinks, *routers))


def token(model: Any, ids: Tensor, cache: StepCache) -> Any:
    """Logits [B, 1, vocabulary] of one token for each sequence, [B, 1] ids, at the cache's position.

    Numerics: as transformers', rounding to the model's dtype where its modules do.
    """
    from microscale.backends.triton.attend import attend_token
    from microscale.backends.triton.small import add_rms_norm, rms_norm, route

    body, batch, position = model.model, ids.shape[0], cache.position
    x: Tensor = body.embed_tokens(ids)[:, 0].contiguous()
    cos, sin = cache.turns(body.rotary_emb, x)
    more: Tensor | None = None
    for layer, kept in zip(body.layers, cache.steps, strict=True):
        norm, at, mlp = layer.input_layernorm, layer.self_attn, layer.mlp
        if more is None:
            y = rms_norm(x, norm.weight, norm.variance_epsilon)
        else:
            x, y = add_rms_norm(x, more, norm.weight, norm.variance_epsilon)
        qkv = product(y, (at.q_proj, at.k_proj, at.v_proj)).view(batch, -1, at.head_dim)
        found = attend_token(qkv, cos, sin, kept.keys, kept.values, at.sinks, at.scaling, position)
        more = product(found.view(batch, -1), (at.o_proj,))
        norm = layer.post_attention_layernorm
        x, y = add_rms_norm(x, more, norm.weight, norm.variance_epsilon)
        weights, chosen = route(product(y, (mlp.router,)), mlp.router.top_k)
        more = mlp.experts(y, chosen, weights).contiguous()
    assert more is not None
    _, y = add_rms_norm(x, more, body.norm.weight, body.norm.variance_epsilon)
    return MoeCausalLMOutputWithPast(logits=product(y, (model.lm_head,))[:, None], past_key_values=cache)


def product(x: Tensor, modules: Sequence[Any]) -> Tensor:
    """[M, K] -> [M, sum of N]: linears side by side, in one kernel for few rows."""
    from microscale.backends.triton import rows

    if x.shape[0] <= rows.MOST and all(_held(module, x) for module in modules):
        return rows.linear(x, [m.weight for m in modules], [m.bias for m in modules])
    found = [F.linear(x, m.weight, m.bias) if isinstance(m, StepGptOssRouter) else m(x) for m in modules]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _held(module: Any, x: Tensor) -> bool:
    """Whether a module is a product with a weight that lies as the kernel reads it."""
    if type(module) not in (nn.Linear, StepGptOssRouter):
        return False
    tensors = [t for t in (module.weight, module.bias) if t is not None]
    if any(t.data_ptr() % 16 for t in (x, module.weight)) or module.weight.shape[1] * x.itemsize % 16:
        return False
    return all(t.dtype is x.dtype and t.device == x.device and t.is_contiguous() for t in tensors)
