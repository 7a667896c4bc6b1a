"""gpt-oss' router and norms, for few rows in the C++ core or in Triton. Imported once a model has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, GptOssTopKRouter

from microscale.backends import autograd
from microscale.canary import DTYPES
from microscale.dense import ROWS, DenseModule
from microscale.integrations.hf.attention import triton_steps
from microscale.machine import detect


class DenseGptOssRouter(DenseModule, GptOssTopKRouter):  # type: ignore[misc]
    """A GptOssTopKRouter in all but its forward."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H] -> logits [M, E], softmax over the chosen [M, T], their ids [M, T]."""
        logits = self.product(hidden_states)
        if logits.is_cpu and logits.shape[0] <= ROWS and _plain(logits, logits) and detect().core:
            from microscale.backends import cpu_core

            weights, ids = cpu_core.route(logits, self.top_k)
            return logits, weights.to(logits.dtype), ids
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
    """Make a model's routers and norms these, on CUDA."""
    take_norms(model)
    for module in model.modules():
        if type(module) is GptOssTopKRouter:
            module.__class__ = StepGptOssRouter
