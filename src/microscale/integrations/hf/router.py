"""gpt-oss' router with its product in the C++ core. Imported once a model has one."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from microscale.dense import DenseModule


class DenseGptOssRouter(DenseModule, GptOssTopKRouter):  # type: ignore[misc]
    """A GptOssTopKRouter in all but its forward."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H] -> logits [M, E], softmax over the chosen [M, T], their ids [M, T]."""
        logits = self.product(hidden_states)
        chosen, ids = torch.topk(logits, self.top_k, dim=-1)
        return logits, torch.softmax(chosen, dim=1, dtype=chosen.dtype), ids
