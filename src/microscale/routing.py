"""Routers: from router logits to the experts of each token and their weights. Pure functions, one per rule.

All of them:
- take logits [M, E] of any floating dtype, M may be 0, and compute in float32.
- return ids int64 [M, T] and weights float32 [M, T], best choice first; T is `top_k`. Ids of a row differ.
- break ties by the lower index, on every device: the sort is stable. Scores equal in float32 are ties.
- let a NaN through: it ranks above every number, so its expert is chosen (the first T of several), a weight
  of the row is NaN, and the ids stay valid. Nothing raises: no device has to wait for a check of values.
- raise BackendError where shapes, `top_k` or the groups contradict each other; the message has both values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from microscale.errors import BackendError

Routed = tuple[Tensor, Tensor]


def softmax_topk(logits: Tensor, top_k: int, *, renormalize: bool = True) -> Routed:
    """Softmax over all experts, then the T largest.

    Args:
        renormalize: divide by the sum of the chosen, which makes this `topk_softmax` but for rounding.
    Source: Mixtral, Qwen3-MoE (`norm_topk_prob`).
    """
    scores = _float32(logits, top_k).softmax(dim=-1)
    return _weigh(scores, _best(scores, top_k), renormalize, 1.0)


def topk_softmax(logits: Tensor, top_k: int) -> Routed:
    """The T largest logits, then softmax over those.

    Source: gpt-oss.
    """
    values = _float32(logits, top_k)
    ids = _best(values, top_k)
    return ids, values.gather(1, ids).softmax(dim=-1)


def sigmoid_topk(
    logits: Tensor, top_k: int, *, bias: Tensor | None = None, renormalize: bool = True, scale: float = 1.0
) -> Routed:
    """Sigmoid scores; the T largest of scores + bias; the weights are the scores without the bias.

    Args:
        bias: [E], the correction that balances load; it chooses and never weighs.
        renormalize: divide by (sum of the chosen + 1e-20).
        scale: multiplies the weights at the end (`routed_scaling_factor`).
    Source: MiniMax-M2; DeepSeek-V3 with one group.
    """
    scores = _float32(logits, top_k).sigmoid()
    return _weigh(scores, _best(_biased(scores, bias), top_k), renormalize, scale)


def grouped_sigmoid_topk(
    logits: Tensor,
    top_k: int,
    *,
    groups: int,
    topk_groups: int,
    bias: Tensor | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
) -> Routed:
    """As `sigmoid_topk`, from the `topk_groups` groups whose two best scores + bias have the largest sum.

    Args:
        groups: how many groups of E / groups consecutive experts (`n_group`). A group of one counts that one.
        topk_groups: how many of them may be chosen from (`topk_group`).
        bias, renormalize, scale: as in `sigmoid_topk`. Without a bias, too, a group scores the sum of two.
    Source: DeepSeek-V3, GLM-4-MoE.
    """
    scores = _float32(logits, top_k).sigmoid()
    members = _grouped(_biased(scores, bias), top_k, groups, topk_groups)
    best_two = members.sort(dim=-1, descending=True).values[..., :2]
    choice = _masked(members, best_two.sum(dim=-1), topk_groups)
    return _weigh(scores, _best(choice, top_k), renormalize, scale)


def grouped_softmax_topk(
    logits: Tensor,
    top_k: int,
    *,
    groups: int,
    topk_groups: int,
    renormalize: bool = False,
    scale: float = 1.0,
) -> Routed:
    """Softmax over all experts; the T largest from the `topk_groups` groups with the largest single scores.

    Args:
        groups, topk_groups: as in `grouped_sigmoid_topk`; 1 and 1 is DeepSeek-V2's "greedy".
        renormalize, scale: as in `sigmoid_topk`.
    Source: DeepSeek-V2 (`group_limited_greedy`).
    """
    scores = _float32(logits, top_k).softmax(dim=-1)
    members = _grouped(scores, top_k, groups, topk_groups)
    choice = _masked(members, members.amax(dim=-1), topk_groups)
    return _weigh(scores, _best(choice, top_k), renormalize, scale)


def sigmoid_top1_on_input(logits: Tensor, top_k: int = 1) -> Routed:
    """The largest logit, weighted by its sigmoid: for `moe(..., weight_on_input=True)`. `top_k` must be 1.

    Source: Llama 4.
    """
    if top_k != 1:
        raise BackendError(f"sigmoid_top1_on_input: expected top_k = 1, found {top_k}")
    values = _float32(logits, top_k)
    ids = _best(values, 1)
    return ids, values.gather(1, ids).sigmoid()


def sqrt_softplus_topk(
    logits: Tensor, top_k: int, *, bias: Tensor | None = None, renormalize: bool = True, scale: float = 1.0
) -> Routed:
    """As `sigmoid_topk`, with sqrt(log(1 + exp(logit))) as the score.

    Source: DeepSeek-V4, but for its hash layers, which look their experts up by token id.
    """
    scores = F.softplus(_float32(logits, top_k)).sqrt()
    return _weigh(scores, _best(_biased(scores, bias), top_k), renormalize, scale)


ROUTERS: dict[str, Callable[..., Routed]] = {
    "softmax_topk": softmax_topk,
    "topk_softmax": topk_softmax,
    "sigmoid_topk": sigmoid_topk,
    "grouped_sigmoid_topk": grouped_sigmoid_topk,
    "grouped_softmax_topk": grouped_softmax_topk,
    "sigmoid_top1_on_input": sigmoid_top1_on_input,
    "sqrt_softplus_topk": sqrt_softplus_topk,
}


def _float32(logits: Tensor, top_k: int) -> Tensor:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise BackendError(f"logits: expected floats [M, E], found {logits.dtype} {tuple(logits.shape)}")
    if not 1 <= top_k <= logits.shape[1]:
        raise BackendError(f"top_k: expected 1 to E = {logits.shape[1]}, found {top_k}")
    return logits.float()


def _best(scores: Tensor, count: int) -> Tensor:
    # torch.topk promises no order between equals.
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _biased(scores: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return scores
    if bias.shape != scores.shape[1:]:
        raise BackendError(f"bias: expected {tuple(scores.shape[1:])}, found {tuple(bias.shape)}")
    return scores + bias.float()


def _grouped(choice: Tensor, top_k: int, groups: int, topk_groups: int) -> Tensor:
    """[M, E] -> [M, groups, E / groups]."""
    experts = choice.shape[1]
    if groups < 1 or experts % groups or not 1 <= topk_groups <= groups:
        raise BackendError(f"cannot choose {topk_groups} of {groups} groups of E = {experts} experts")
    if topk_groups * (experts // groups) < top_k:
        raise BackendError(f"top_k: {topk_groups} groups of {experts // groups} experts do not have {top_k}")
    return choice.reshape(-1, groups, experts // groups)


def _masked(members: Tensor, group_scores: Tensor, topk_groups: int) -> Tensor:
    """[M, groups, E / groups] -> [M, E], -inf in every group but the best `topk_groups`."""
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, _best(group_scores, topk_groups), True)
    return members.masked_fill(~kept[..., None], -torch.inf).flatten(1)


def _weigh(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> Routed:
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # DeepSeek-V3's guard against 0 / 0
    return ids, weights * scale
