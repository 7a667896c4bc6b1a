"""Attention with sinks (gpt-oss) through PyTorch's fused kernels, which know none: for long prompts without a cache.

transformers computes it eagerly, [heads, T, T] scores and all; on a CPU that is most of the time of a long window.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "microscale_sinks"  # the word for transformers' `attn_implementation`
_ARCHITECTURES = ("gpt_oss",)  # those whose modules hand their sinks over as `s_aux`

# Keys put before the tokens' own: the last stands for the sink, the others for nothing. Eight keep the rows of a
# mask 16-byte aligned, which CUDA's kernels want, and so do eight more components of each head.
_SLOTS = 8
_VOID = -1e4


def fuse_sinks(model: Any) -> bool:
    """Switch a model that would compute sinks eagerly to this; says whether it did. Others are left alone."""
    config = model.config.get_text_config()
    if config.model_type not in _ARCHITECTURES or config._attn_implementation != "eager":
        return False
    AttentionInterface.register(NAME, sink_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


def sink_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax over a query's keys and its head's sink, of which the sink has no value.

    A sink s adds exp(s) to the softmax's denominator: a key before all others whose logit is s and whose value is
    0. One more component, 1 in each query and s / scaling in that key alone, gives it this logit.

    Args:
        query: [B, heads, Q, D].
        key, value: [B, key heads, K, D].
        attention_mask: bool [B or 1, 1, Q, K], True: look at it. None: causal, or all keys for a single query.
        s_aux: [heads].
    Returns:
        [B, Q, heads, D], and no weights.
    """
    assert s_aux is not None
    heads, length, width = query.shape[1:]
    repeat = heads // key.shape[1]
    causal = attention_mask is None and length > 1
    if causal:  # a static cache hands over its empty end, too
        key, value = key[:, :, :length], value[:, :, :length]
    key, value = (F.pad(t.repeat_interleave(repeat, dim=1), (0, 8, _SLOTS, 0)) for t in (key, value))
    query = F.pad(query, (0, 8, _SLOTS if causal else 0, 0))
    query[..., width] = 1
    logits = torch.cat([s_aux.new_full((heads, _SLOTS - 1), _VOID), s_aux[:, None]], dim=1) / scaling
    key[:, :, :_SLOTS, width] = logits.to(key.dtype)
    mask = None if attention_mask is None else F.pad(attention_mask, (_SLOTS, 0), value=True)
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scaling)
    return out[:, :, _SLOTS if causal else 0 :, :width].transpose(1, 2).contiguous(), None
