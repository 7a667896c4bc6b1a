"""gpt-oss' router and norms, for few rows in the C++ core. Imported once a model has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, GptOssTopKRouter

from microscale.backends import autograd
from microscale.canary import DTYPES
from microscale.dense import ROWS, DenseModule


class DenseGptOssRouter(DenseModule, GptOssTopKRouter):  # type: ignore[misc]
    """A GptOssTopKRouter in all but its forward."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H] -> logits [M, E], softmax over the chosen [M, T], their ids [M, T]."""
        logits = self.product(hidden_states)
        chosen, ids = torch.topk(logits, self.top_k, dim=-1)
        return logits, torch.softmax(chosen, dim=1, dtype=chosen.dtype), ids


class DenseGptOssRMSNorm(GptOssRMSNorm):
    """A GptOssRMSNorm in all but its forward: rounded once, as it is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        x, w = hidden_states, self.weight
        if (
            0 < x.numel() <= ROWS * w.numel()
            and x.is_cpu
            and w.is_cpu
            and x.shape[-1] == w.numel()
            and x.is_contiguous()
            and x.dtype in DTYPES.values()
            and w.dtype in DTYPES.values()
            and not torch.compiler.is_compiling()
            and not autograd.watched(x, w)
        ):
            from microscale.backends import cpu_core

            return cpu_core.rms_norm(x, w, self.variance_epsilon)
        found: Tensor = super().forward(x)
        return found


def take_norms(model: nn.Module) -> None:
    """Make a model's norms these."""
    for module in model.modules():
        if type(module) is GptOssRMSNorm:
            module.__class__ = DenseGptOssRMSNorm
