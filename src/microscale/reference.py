"""What every backend must equal: `activate`, `linear` and `moe` in plain float32 or float64 torch.

Each formula stands here as one reads it, on any device. Nothing is fused or padded; only routed experts are
dequantised, one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from microscale.activations import Activation
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.operands import check_linear, check_moe, local_ids, stored
from microscale.quant import QuantTensor, dequantize


def activate(h: Tensor, activation: Activation) -> Tensor:
    """The non-linearity between w13 and w2, by the formulas in `activations`, computed in h's dtype.

    Args:
        h: [..., rows], rows = activation.rows(I): gates then ups, or alternating where `interleaved`.
    Returns:
        [..., I], dtype of h. A NaN in gate or up passes every clamp.
    Raises:
        BackendError: an odd number of rows for a gated activation.
    """
    kind, limit, alpha, beta = activation.kind, activation.limit, activation.alpha, activation.beta
    gate, up = h, torch.ones_like(h)
    if activation.gated:
        half, odd = divmod(h.shape[-1], 2)
        if odd:
            raise BackendError(f"a gated activation needs an even number of rows, found {h.shape[-1]}")
        split = (h[..., 0::2], h[..., 1::2]) if activation.interleaved else (h[..., :half], h[..., half:])
        gate, up = split
    if limit is not None:
        up = up.clamp(-limit, limit) if activation.gated else up
        gate = gate if kind == "swiglu_step" else gate.clamp(max=limit)
    if kind == "silu":
        return F.silu(gate) * up
    if kind == "swiglu_oai":
        return gate * torch.sigmoid(alpha * gate) * (up + beta)
    if kind == "swiglu_step":
        return F.silu(gate).clamp(max=limit) * up if limit is not None else F.silu(gate) * up
    if kind == "situ":
        return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * alpha * torch.tanh(up / alpha)
    if kind == "relu2":
        return F.relu(gate).square() * up
    return F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up


def linear(
    x: Tensor,
    w: QuantTensor,
    bias: Tensor | None = None,
    *,
    act: Format | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = x @ dequantize(w).T + bias.

    Args:
        x: [..., K], any floating dtype. Leading dimensions may be 0.
        w: [N, K].
        bias: [N], any floating dtype.
        act: quantise x to this format first, each row on its own (NVFP4: its own tensor scale).
        dtype: what it is computed in: float32, or float64 for error budgets.
    Returns:
        [..., N] in `dtype`.
    Raises:
        BackendError: shapes or dtypes that disagree, or an `act` that shares scales between rows.
    Numerics: other rows change a row only through the order in which its sums are taken: by at most
        2 K eps sum_k |x w|, and not at all where every partial sum is exact.
    """
    _check_dtype(dtype)
    check_linear(x, w.shape, bias)
    y = stored(x, act, dtype) @ dequantize(w, dtype).T
    return y if bias is None else y + bias.to(dtype)


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: QuantTensor,
    w2: QuantTensor,
    activation: Activation,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    expert_map: Tensor | None = None,
    weight_on_input: bool = False,
    act: Format | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y[m] = sum_t weight[m, t] * (w2[e] @ activate(w13[e] @ x[m] + b13[e]) + b2[e]), with e = id[m, t].

    Args:
        x: [M, H], any floating dtype. M may be 0.
        topk_ids: [M, T], any integer dtype: global expert ids. -1 is padding, and its weight is not read. An
            expert that stands twice in a row counts twice.
        topk_weights: [M, T], any floating dtype.
        w13, w2: [E, rows, H] with rows = activation.rows(I), and [E, N, I]; N is H in every known model.
        b13, b2: [E, rows] and [E, N].
        expert_map: integers [E_global]: a global id's index into w13, or -1: elsewhere. None: the identity.
        weight_on_input: x[m] times its weight goes in, and what comes out is not weighted. Needs T = 1.
        act: quantise the input of both products to this format, each row on its own.
        dtype: what it is computed in: float32, or float64 for error budgets.
    Returns:
        [M, N] in `dtype`, summed in ascending order of local expert; 0 for a row that has none here.
    Raises:
        BackendError: shapes or dtypes that disagree, an id or an entry of expert_map out of range, or
            weight_on_input with T other than 1.
    Numerics: other rows as in `linear`. With `act`, an intermediate's last bit may decide its code.
    Source: gpt-oss (b2 inside the weighting), Llama 4 (weight_on_input), vLLM (-1 as padding, expert_map).
    """
    _check_dtype(dtype)
    check_moe(x, topk_ids, topk_weights, w13.shape, w2.shape, activation, b13, b2, weight_on_input)
    local = local_ids(topk_ids, expert_map, w13.shape[0])
    x, weights = x.to(dtype), topk_weights.to(dtype)
    if weight_on_input:
        x, weights = x * weights, torch.ones_like(weights)
    y = x.new_zeros(x.shape[0], w2.shape[1])
    for e in sorted(set(local.flatten().tolist()) - {-1}):
        token, slot = (local == e).nonzero(as_tuple=True)
        h = linear(x[token], w13[e], None if b13 is None else b13[e], act=act, dtype=dtype)
        out = linear(activate(h, activation), w2[e], None if b2 is None else b2[e], act=act, dtype=dtype)
        y.index_add_(0, token, out * weights[token, slot, None])
    return y


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise BackendError(f"dtype: expected torch.float32 or torch.float64, found {dtype}")
