"""The C++ core's products as operators of torch, so that `torch.compile` sees one node with a known shape.

Only plain values cross: tensors, integers, strings. Eager code calls `backends.cpu_core` without this detour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends import cpu_core


@torch.library.custom_op("microscale::linear", mutates_args=())
def linear(
    x: Tensor,
    packed: Tensor,
    outer: Tensor | None,
    n: int,
    bias: Tensor | None,
    x_outer: Tensor | None = None,
) -> Tensor:
    """[..., K] -> [..., N]; `packed` and `outer` as in `backends.cpu.Packed`, `x_outer` as `cpu_core.linear` has it."""
    return cpu_core.linear(x, packed, outer, n, bias, x_outer)


@linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    outer: Tensor | None,
    n: int,
    bias: Tensor | None,
    x_outer: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.custom_op("microscale::dense", mutates_args=())
def dense(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] -> [..., N]; w [N, K] is not packed."""
    return cpu_core.dense(x, w, bias)


@dense.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


@torch.library.custom_op("microscale::attend", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float
) -> Tensor:
    """[B, heads, Q, D], [B, key heads, T, D] twice -> [B, Q, heads, D]."""
    return cpu_core.attend(q, k, v, mask, sinks, scale)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float) -> Tensor:
    b, heads, queries, _ = q.shape
    return q.new_empty((b, queries, heads, v.shape[-1]))


@torch.library.custom_op("microscale::moe", mutates_args=())
def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    packed13: Tensor,
    outer13: Tensor | None,
    packed2: Tensor,
    outer2: Tensor | None,
    experts: int,
    n: int,
    kind: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    beta: float,
    limit: float | None,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    weight_on_input: bool,
    stored: str = "",
    x_outer: Tensor | None = None,
) -> Tensor:
    """[M, H] -> [M, N]; the activation's fields one by one. `stored`, `x_outer`: as `cpu_core.moe` has them."""
    activation = Activation(kind, gated, interleaved, alpha, beta, limit)
    weights = (packed13, outer13, packed2, outer2, experts, n)
    rest = (b13, b2, expert_map, weight_on_input, stored, x_outer)
    return cpu_core.moe(x, topk_ids, topk_weights, *weights, activation, *rest)


@moe.register_fake
def _(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    packed13: Tensor,
    outer13: Tensor | None,
    packed2: Tensor,
    outer2: Tensor | None,
    experts: int,
    n: int,
    kind: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    beta: float,
    limit: float | None,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    weight_on_input: bool,
    stored: str = "",
    x_outer: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], n))
