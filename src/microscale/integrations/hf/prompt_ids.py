"""What tokens are before anybody computes with them: some, in rows of one length, and of the model's vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from microscale.errors import PromptError


def check_prompt(model: Any, ids: Any) -> None:
    """Refuse ids that no model takes, which PyTorch would in its own words, and a GPU by stopping for good.

    Raises:
        PromptError: not integers [B, T] of B and T >= 1, or beyond the model's embedding.
    """
    if not isinstance(ids, Tensor):
        raise PromptError(f"token ids are a tensor [B, T], not {type(ids).__name__}")
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise PromptError(f"token ids are integers [B, T], not {ids.dtype} {list(ids.shape)}")
    if ids.numel() == 0:
        raise PromptError(f"the prompt is empty: its ids are {list(ids.shape)}")
    table = model.get_input_embeddings()
    count = table.num_embeddings if isinstance(table, torch.nn.Embedding) else None
    low, high = (int(t) for t in torch.aminmax(ids))
    if low < 0 or (count is not None and high >= count):
        raise PromptError(f"token {low if low < 0 else high} is none of the model's {count or ''}".rstrip())
