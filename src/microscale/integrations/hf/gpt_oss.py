"""gpt-oss' router, norms and attention, for few rows in the C++ core or in Triton. Imported once a model has them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRMSNorm, GptOssTopKRouter

from microscale.backends import autograd
from microscale.canary import DTYPES
from microscale.dense import ROWS, DenseModule
from microscale.integrations.hf.attention import NAME, triton_steps
from microscale.integrations.hf.step_cache import StepCache
from microscale.machine import detect


class DenseGptOssRouter(DenseModule, GptOssTopKRouter):  # type: ignore[misc]
    """A GptOssTopKRouter in all but its forward."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H] -> logits [M, E], softmax over the chosen [M, T], their ids [M, T]."""
        logits = self.product(hidden_states)
        chosen, ids = torch.topk(logits, self.top_k, dim=-1)
        return logits, torch.softmax(chosen, dim=1, dtype=chosen.dtype), ids


class StepGptOssRouter(GptOssTopKRouter):
    """A GptOssTopKRouter that chooses for few rows on CUDA in one kernel."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H] -> logits [M, E], softmax over the chosen [M, T], their ids [M, T]."""
        x = hidden_states
        if not (x.is_cuda and x.shape[0] <= ROWS and _plain(x, self.weight)):
            found: tuple[Tensor, Tensor, Tensor] = super().forward(x)  # type: ignore[no-untyped-call]
            return found
        from microscale.backends.triton.small import route

        logits = F.linear(x, self.weight, self.bias)
        weights, ids = route(logits, self.top_k)
        return logits, weights, ids


class DenseGptOssRMSNorm(GptOssRMSNorm):
    """A GptOssRMSNorm in all but its forward: rounded once, as it is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        x, w = hidden_states, self.weight
        if _plain(x, w) and x.numel() <= ROWS * w.numel() and x.shape[-1] == w.numel() and x.is_contiguous():
            if x.is_cpu and detect().core:
                from microscale.backends import cpu_core

                return cpu_core.rms_norm(x, w, self.variance_epsilon)
            if triton_steps(x.device):
                from microscale.backends.triton.small import rms_norm

                return rms_norm(x, w, self.variance_epsilon)
        found: Tensor = super().forward(x)
        return found


class StepGptOssAttention(GptOssAttention):
    """A GptOssAttention that takes a step over a `StepCache` in few kernels, and all else as it is."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, H] -> [B, T, H], and no weights."""
        x, cache = hidden_states, past_key_values
        step = isinstance(cache, StepCache) and cache.length and self.config._attn_implementation == NAME
        if not (step and x.is_cuda and _plain(x, self.sinks)):
            found: tuple[Tensor, Tensor | None] = super().forward(
                x, position_embeddings, attention_mask, past_key_values=cache, **kwargs
            )
            return found
        from microscale.backends.triton.attend import attend
        from microscale.backends.triton.small import turn_and_store

        layer, batch = cache.steps[self.layer_idx], x.shape[0]
        q, k, v = (p(x).view(batch, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        slot = cache.slot(layer.slots)
        query = turn_and_store(q, k, v, *position_embeddings, layer.keys, layer.values, slot)
        y = attend(query, layer.keys, layer.values, None, self.sinks, self.scaling, cache.position)
        return self.o_proj(y.view(batch, 1, -1)), None


def _plain(x: Tensor, w: Tensor) -> bool:
    """Whether our kernels may stand for torch's operators: on the device of both, in dtypes that they take."""
    return (
        x.numel() > 0
        and x.device == w.device
        and w.is_contiguous()
        and x.dtype in DTYPES.values()
        and w.dtype in DTYPES.values()
        and not torch.compiler.is_compiling()
        and not autograd.watched(x, w)
    )


def take_norms(model: nn.Module) -> None:
    """Make a model's norms these."""
    for module in model.modules():
        if type(module) is GptOssRMSNorm:
            module.__class__ = DenseGptOssRMSNorm


def take_steps(model: nn.Module) -> None:
    """Make a model's attention, routers and norms these, on CUDA. Its sinks must be fused: masks are of bools."""
    take_norms(model)
    for module in model.modules():
        if type(module) is GptOssAttention:
            module.__class__ = StepGptOssAttention
        elif type(module) is GptOssTopKRouter:
            module.__class__ = StepGptOssRouter
