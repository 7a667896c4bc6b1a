"""Attention with sinks (gpt-oss): prompts through PyTorch's fused kernels, which know none, and tokens through ours.

transformers computes it eagerly: [heads, T, T] scores and all for a prompt, which is most of the time of a long one,
and for a token a copy of the whole cache for every head.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from microscale.backends import autograd
from microscale.backends.triton_rules import refuse_steps
from microscale.canary import DTYPES, device_kind
from microscale.machine import detect

NAME = "microscale_sinks"  # the word for transformers' `attn_implementation`
_ARCHITECTURES = ("gpt_oss",)  # those whose modules hand their sinks over as `s_aux`

# Keys put before the tokens' own: the last stands for the sink, the others for nothing. Eight keep the rows of a
# mask 16-byte aligned, which CUDA's kernels want, and so do eight more components of each head.
_SLOTS = 8
_VOID = -1e4
_QUERIES = 8  # that the core takes at once; each reads all keys again
# Queries of a sliding layer's prompt that are taken together: a window's, but within these.
_BLOCK = (64, 256)


def fuse_sinks(model: Any) -> bool:
    """Switch a model that would compute sinks eagerly to this; says whether it did. Others are left alone."""
    config = model.config.get_text_config()
    if config.model_type not in _ARCHITECTURES or config._attn_implementation != "eager":
        return False
    AttentionInterface.register(NAME, sink_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if triton_steps(model.device):
        from microscale.integrations.hf.gpt_oss import take_steps

        take_steps(model)
    return True


@cache
def triton_steps(device: torch.device) -> bool:
    """Whether a token's attention, norms and routes are Triton's there: where they ran for us, or nearly.

    Asked several times a layer, so it is kept; not to be asked while torch.compile looks on, which knows no caches.
    """
    return refuse_triton(device) is None


def refuse_triton(device: torch.device) -> str | None:
    """None, or why `triton_steps` is False, in a sentence."""
    kind = device_kind(device)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if kind == "cuda" else ""
    return refuse_steps(kind, arch, dict(detect().packages))


def sink_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax over a query's keys and its head's sink, of which the sink has no value.

    A sink s adds exp(s) to the softmax's denominator: a key before all others whose logit is s and whose value is
    0. One more component, 1 in each query and s / scaling in that key alone, gives it this logit.

    Args:
        query: [B, heads, Q, D].
        key, value: [B, key heads, K, D].
        attention_mask: bool [B or 1, 1 or heads, Q, K], True: look at it; or numbers that are added to the logits, as
            callers of transformers may give them. None: causal, or all keys for a single query.
        s_aux: [heads].
        sliding_window: how many keys up to its own a query looks at, which the mask says, too; None: all.
    Returns:
        [B, Q, heads, D], and no weights.
    """
    assert s_aux is not None
    if not dropout and _few(query, key, value, attention_mask, s_aux):
        if torch.compiler.is_compiling():
            from microscale import ops

            return ops.attend(query, key, value, attention_mask, s_aux, scaling), None
        if not autograd.watched(query, key, value, s_aux):
            from microscale.backends import cpu_core

            return cpu_core.attend(query, key, value, attention_mask, s_aux, scaling), None
    if attention_mask is not None and attention_mask.dtype is not torch.bool:
        attention_mask = attention_mask.to(query.dtype)
    elif not dropout and _one(query, key, value, s_aux):
        from microscale.backends.triton.attend import attend

        return attend(query, key, value, attention_mask, s_aux, scaling), None
    if not dropout and _prompt(query, key, value, s_aux):
        return _in_blocks(query, key, value, attention_mask, s_aux, scaling, sliding_window), None
    heads, length, width = query.shape[1:]
    repeat = heads // key.shape[1]
    causal = attention_mask is None and bool(length > 1)  # a tracer has tensors for sizes
    if causal:  # a static cache hands over its empty end, too
        key, value = key[:, :, :length], value[:, :, :length]
    key, value = (F.pad(t.repeat_interleave(repeat, dim=1), (0, 8, _SLOTS, 0)) for t in (key, value))
    query = F.pad(query, (0, 8, _SLOTS if causal else 0, 0))
    query[..., width] = 1
    logits = torch.cat([s_aux.new_full((heads, _SLOTS - 1), _VOID), s_aux[:, None]], dim=1) / scaling
    key[:, :, :_SLOTS, width] = logits.to(key.dtype)
    mask = attention_mask
    if mask is not None:
        mask = F.pad(mask, (_SLOTS, 0), value=True if mask.dtype is torch.bool else 0.0)
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scaling)
    return out[:, :, _SLOTS if causal else 0 :, :width].transpose(1, 2).contiguous(), None


def _in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor,
    scaling: float,
    window: int | None,
) -> Tensor:
    """A prompt on the CPU -> [B, Q, heads, D]: of a sliding layer, block by block the keys that its window reaches."""
    length = query.shape[2]
    if mask is None:  # causal; a static cache hands over its empty end, too
        key, value = key[:, :, :length], value[:, :, :length]
        return _beside_sinks(query, key, value, None, sinks, scaling).contiguous()
    block = min(max(window or 0, _BLOCK[0]), _BLOCK[1])
    parts = [
        (slice(first, first + block), slice(max(first - (window or 0) + 1, 0), first + block))
        for first in range(0, length, block)
    ]
    if not window or key.shape[2] != length or length <= window + block or _beyond(mask, parts):
        return _beside_sinks(query, key, value, mask, sinks, scaling).contiguous()
    out = query.new_empty(query.shape[0], length, query.shape[1], value.shape[3])
    for queries, keys in parts:
        part = (query[:, :, queries], key[:, :, keys], value[:, :, keys], mask[:, :, queries, keys])
        out[:, queries] = _beside_sinks(*part, sinks, scaling)
    return out


def _beyond(mask: Tensor, parts: list[tuple[slice, slice]]) -> bool:
    """Whether a caller's own mask lets queries look at keys that are none of their part's."""
    if mask.dtype is not torch.bool:
        return True
    seen = mask.numpy()  # whose `any` took a fifth of torch's time, in every sliding layer
    return any(
        seen[:, :, queries, : keys.start].any() or seen[:, :, queries, keys.stop :].any()
        for queries, keys in parts
    )


def _beside_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor, scaling: float
) -> Tensor:
    """Causal attention, or by a mask, -> [B, Q, heads, D], not contiguous.

    A query's result without a sink, times what its keys have of the softmax's denominator: that, as a logarithm, is
    what PyTorch's kernel leaves for the backward pass.
    """
    added = mask
    if mask is not None and mask.dtype is torch.bool:
        added = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, float("-inf"))
    out, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, mask is None, attn_mask=added, scale=scaling
    )
    share = torch.sigmoid(logarithm - sinks.float()[:, None])[..., None]
    found = torch.where(share > 0, out * share, 0).to(query.dtype)  # 0 where nothing is looked at, not NaN
    return found.transpose(1, 2)


def _prompt(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> bool:
    """Whether PyTorch's kernel for CPUs takes it as it is: queries of a prompt, and nobody asks for gradients."""
    tensors = (query, key, value, sinks)
    return (
        query.is_cpu
        and query.shape[2] > 1
        and not torch.compiler.is_compiling()
        and all(t.dtype is sinks.dtype and t.stride(-1) == 1 for t in tensors)
        and key.shape[3] == value.shape[3] == query.shape[3]
        and sinks.dtype in DTYPES.values()
        and not autograd.watched(*tensors)
    )


def _one(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> bool:
    """Whether the Triton kernel takes it: a query for each sequence, on CUDA."""
    tensors = (query, key, value, sinks)
    return (
        query.is_cuda
        and query.shape[2] == 1
        and not torch.compiler.is_compiling()
        and triton_steps(query.device)
        and all(t.dtype is sinks.dtype and t.stride(-1) == 1 for t in tensors)
        and sinks.dtype in DTYPES.values()
        and not autograd.watched(*tensors)
    )


def _few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor) -> bool:
    """Whether the C++ core takes it: a few queries on the CPU, each of whose keys are given or all there are."""
    if query.shape[2] > _QUERIES or (mask is None and query.shape[2] > 1) or not detect().core:
        return False
    tensors = (query, key, value)
    (b, heads, queries, width), (_, key_heads, tokens, _) = query.shape, value.shape
    if key.shape != (b, key_heads, tokens, width) or value.shape[0] != b or sinks.shape != (heads,):
        return False
    if mask is not None and mask.shape not in ((1, 1, queries, tokens), (b, 1, queries, tokens)):
        return False
    return (
        all(t.is_cpu and t.dtype is sinks.dtype and t.stride(-1) == 1 for t in tensors)
        and sinks.dtype in DTYPES.values()
        and sinks.is_contiguous()
        and sinks.is_cpu
        and (mask is None or (mask.dtype is torch.bool and mask.is_cpu and mask.stride(-1) == 1))
        and not (torch.compiler.is_compiling() and torch.is_grad_enabled())
    )
