"""A token through all layers of a model in few kernels: what `step.Step` captures instead of the forward.

A layer is eight kernels of ours, and one of experts on Hopper seven. Each adds what the one before it gave to the
stream as it takes the norm of it, and on Hopper each is launched before the one ahead has ended (see
`backends.triton.small`). The slow twin is transformers' forward of the same token over the same cache. `chain_parts`
says for which models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from microscale.integrations.hf.architectures import Kind
from microscale.integrations.hf.step_cache import StepCache
from microscale.nn import QuantLinear, runner_of
from microscale.quant_experts import QuantExperts


def token(kind: Kind, model: Any, ids: Tensor, cache: StepCache) -> Any:
    """Logits [B, 1, vocabulary] of one token for each sequence, [B, 1] ids, at the cache's position.

    Numerics: as transformers', rounding to the model's dtype where its modules do.
    """
    from microscale.backends.triton.attend import Turn, attend_token
    from microscale.backends.triton.small import add_rms_norm, rms_norm

    body, batch, position = model.model, ids.shape[0], cache.position
    x: Tensor = body.embed_tokens(ids)[:, 0].contiguous()
    cos, sin = cache.turns(body.rotary_emb, x)
    turn, more = Turn(cos, sin), None
    for layer, kept in zip(body.layers, cache.steps, strict=True):
        norm, at = layer.input_layernorm, layer.self_attn
        if more is None:
            y = rms_norm(x, norm.weight, norm.variance_epsilon, kind.twice)
        else:
            x, y = add_rms_norm(x, more, norm.weight, norm.variance_epsilon, kind.twice)
        q, k, v = products(y, (at.q_proj, at.k_proj, at.v_proj))
        if kind.head_norms:
            eps = at.q_norm.variance_epsilon
            turn = Turn(cos, sin, at.q_norm.weight, at.k_norm.weight, eps)
        sinks = at.sinks if kind.sinks else None
        found = attend_token(
            q, k, v, turn, kept.keys, kept.values, sinks, at.scaling, position, cache.arrived
        )
        (more,) = products(found.view(batch, -1), (at.o_proj,))
        x, more = _fed_forward(kind, layer, x, more)
    assert more is not None
    _, y = add_rms_norm(x, more, body.norm.weight, body.norm.variance_epsilon, kind.twice)
    (logits,) = products(y, (model.lm_head,))
    return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)


def _fed_forward(kind: Kind, layer: Any, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """What stands behind attention, which gave `more`: x + more, both [B, H], and what is added to that next.

    That is [B, H], or of experts [B, T, H]: see `small.add_rms_norm`.
    """
    from microscale.backends.triton import rows
    from microscale.backends.triton.router import norm_and_product, takes
    from microscale.backends.triton.small import Choice, add_rms_norm, silu_gate

    norm, mlp = layer.post_attention_layernorm, layer.mlp
    given = (x, more, norm.weight, norm.variance_epsilon, kind.twice)
    experts = getattr(mlp, "experts", None)
    if experts is None:
        x, y = add_rms_norm(*given)
        gate, up = products(y, (mlp.gate_proj, mlp.up_proj))
        return x, products(silu_gate(gate, up), (mlp.down_proj,))[0]
    router = getattr(mlp, kind.router)
    of_all = not getattr(router, "norm_topk_prob", True)
    if x.shape[0] <= rows.MOST and _held(router, x) and takes(router.weight):
        x, y, logits = norm_and_product(*given, router.weight, _bias(router))
    else:
        x, y = add_rms_norm(*given)
        (logits,) = products(y, (router,))
    runner, choice = runner_of(experts), Choice(logits, router.top_k, of_all, kind.shares)
    found = runner.shares(y, choice) if isinstance(runner, QuantExperts) else None
    if found is None:
        weights, chosen = choice.routes()
        found = experts(y, chosen, weights)
    return x, found.contiguous()


def products(x: Tensor, modules: Sequence[Any]) -> list[Tensor]:
    """[M, K] -> [M, N] of each: linears that meet the same tokens, in one kernel for few rows of plain weights."""
    from microscale.backends.triton import rows

    few = x.shape[0] <= rows.MOST
    if few and all(_held(module, x) for module in modules):
        y = rows.linear(x, [m.weight for m in modules], [_bias(m) for m in modules])
        return [y] if len(modules) == 1 else list(y.split([m.weight.shape[0] for m in modules], -1))
    found = []
    for module in modules:
        if isinstance(module, QuantLinear):
            found.append(module(x))
        elif few and _held(module, x):
            found.append(rows.linear(x, [module.weight], [_bias(module)]))
        else:
            found.append(F.linear(x, module.weight, _bias(module)))
    return found


def _bias(module: Any) -> Tensor | None:
    return getattr(module, "bias", None)


def _held(module: Any, x: Tensor) -> bool:
    """Whether a module is a product with a weight that lies as the kernel reads it."""
    if isinstance(module, QuantLinear):
        return False
    weight, bias = module.weight, _bias(module)
    if any(t.data_ptr() % 16 for t in (x, weight)) or weight.shape[1] * x.itemsize % 16:
        return False
    tensors = [t for t in (weight, bias) if t is not None]
    return all(t.dtype is x.dtype and t.device == x.device and t.is_contiguous() for t in tensors)
