"""`linear` and `moe` of the contract around one product: what every adapter would otherwise write again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends import autograd, emulation
from microscale.errors import BackendError
from microscale.formats import Format, activation_word
from microscale.operands import check_linear, check_moe, local_ids
from microscale.oracle import Problem
from microscale.quant import QuantTensor
from microscale.reference import activate


class Packed(Protocol):
    """What an adapter's `pack` returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K] or [E, N, K] of the weight."""

    @property
    def format(self) -> Format:
        """Of the weight."""


# (x [M, K], packed [N, K], bias [N] or None, act) -> [M, N]; M > 0.
Product = Callable[[Tensor, Any, Tensor | None, Format | None], Tensor]
# (rows [R, K] sorted by expert, packed [E, N, K], offsets int64 [E + 1], bias [E, N] or None, act) -> [R, N]; R > 0.
# Rows offsets[e] .. offsets[e + 1] are expert e's.
Grouped = Callable[[Tensor, Any, Tensor, Tensor | None, Format | None], Tensor]
Unpack = Callable[[Any], QuantTensor]
# The part of an adapter's rules that does not ask for a machine: None, or a sentence.
Operands = Callable[[Problem], str | None]
_WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def linear(
    x: Tensor,
    w: Packed,
    bias: Tensor | None,
    act: Format | None,
    product: Product,
    unpack: Unpack,
    operands: Operands,
    device: str = "",
) -> Tensor:
    """See `contract.Contract.linear`. The product's result is rounded to x's dtype if it is wider.

    Args:
        operands: asked before the package is called; `device` is what it may depend on.
    Raises:
        BackendError: operands that contradict each other, or that the oracle would not have sent here.
    """
    check_linear(x, w.shape, bias)
    _check(operands, "linear", x, w, act, device, bias is not None)

    def fast(x: Tensor, bias: Tensor | None) -> Tensor:
        n, k = w.shape
        rows = x.reshape(-1, k)
        if 0 in (rows.shape[0], n, k):
            return _nothing(x, n) if bias is None else _nothing(x, n) + bias.to(x.dtype)
        return product(rows.contiguous(), w, bias, act).to(x.dtype).reshape(*x.shape[:-1], n)

    def slow(x: Tensor, bias: Tensor | None) -> Tensor:
        return emulation.linear(x, emulation.Packed(unpack(w)), bias, act=act)

    return autograd.run(fast, slow, x, bias)


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Packed,
    w2: Packed,
    activation: Activation,
    *,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    weight_on_input: bool,
    act: Format | None,
    grouped: Grouped,
    unpack: Unpack,
    operands: Operands,
    device: str = "",
) -> Tensor:
    """See `contract.Contract.moe`. Waits for the device once, to know how many routes there are.

    Numerics: the intermediate is rounded once to x's dtype (or quantised, from float32), and so is each token's
    share of an expert where the product rounds; the sum over experts is float32, in the order of a token's routes.

    Args:
        operands, device: as of `linear`.
    Raises:
        BackendError: as of `linear`.
    """
    check_moe(x, topk_ids, topk_weights, w13.shape, w2.shape, activation, b13, b2, weight_on_input)
    for w in (w13, w2):
        _check(operands, "moe", x, w, act, device, b13 is not None or b2 is not None, w2.shape[2])

    def fast(x: Tensor, topk_weights: Tensor, b13: Tensor | None, b2: Tensor | None) -> Tensor:
        experts, n = w2.shape[:2]
        order, offsets = _by_expert(local_ids(topk_ids, expert_map, experts), experts)
        if 0 in (order.numel(), *w13.shape, *w2.shape):
            return _nothing(x, n)
        weights = topk_weights.flatten()[order, None].float()
        rows = x[order // topk_ids.shape[1]]
        if weight_on_input:
            rows = rows.float() * weights
        wide = torch.float32 if act is not None else x.dtype  # what is quantised next is not rounded before
        h = grouped(rows.to(wide).contiguous(), w13, offsets, b13, act)
        middle = activate(h.float(), activation).to(wide)
        y = grouped(middle.contiguous(), w2, offsets, b2, act).float()
        # Each route has a row of its own, so that sums are taken in the same order every time.
        shares = y.new_zeros(topk_ids.numel(), n)
        shares[order] = y if weight_on_input else y * weights
        return shares.view(*topk_ids.shape, n).sum(dim=1).to(x.dtype)

    def slow(x: Tensor, topk_weights: Tensor, b13: Tensor | None, b2: Tensor | None) -> Tensor:
        return emulation.moe(
            x,
            topk_ids,
            topk_weights,
            emulation.Packed(unpack(w13)),
            emulation.Packed(unpack(w2)),
            activation,
            b13=b13,
            b2=b2,
            expert_map=expert_map,
            weight_on_input=weight_on_input,
            act=act,
        )

    return autograd.run(fast, slow, x, topk_weights, b13, b2)


def one_by_one(product: Product, entry: Callable[[Any, int], Any]) -> Grouped:
    """A grouped product from a plain one: a call for each expert that has rows. Waits for the device.

    Args:
        entry: (packed [E, N, K], e) -> packed [N, K], as views.
    """

    def grouped(rows: Tensor, w: Any, offsets: Tensor, bias: Tensor | None, act: Format | None) -> Tensor:
        edges = offsets.tolist()
        spans = [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(edges)) if a < b]
        parts = [product(rows[a:b], entry(w, e), None if bias is None else bias[e], act) for e, a, b in spans]
        return torch.cat(parts)

    return grouped


def exactly(bias: Tensor, dtype: torch.dtype, who: str) -> Tensor:
    """A bias in the dtype that a kernel adds it in.

    Raises:
        BackendError: that would change it. Waits for the device.
    """
    narrow = bias.to(dtype)
    if bias.dtype not in (dtype, torch.bool) and not torch.equal(narrow.to(bias.dtype), bias):
        raise BackendError(f"{who} adds biases in {dtype}, and this {bias.dtype} one would lose bits")
    return narrow


def _check(
    operands: Operands,
    op: str,
    x: Tensor,
    w: Packed,
    act: Format | None,
    device: str,
    bias: bool,
    inner: int = 0,
) -> None:
    dtype = _WORDS.get(x.dtype, str(x.dtype))
    n, k = w.shape[-2:]
    if op == "moe":
        n = k = x.shape[-1]
    problem = Problem(
        op, w.format.name, n, k, activation_word(act), dtype, device, intermediate=inner, bias=bias
    )
    why = _why(operands, problem)
    if why is not None:
        raise BackendError(why)


@cache
def _why(operands: Operands, problem: Problem) -> str | None:
    return operands(problem)


def _by_expert(local: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(routes sorted by expert, those without one left out; offsets int64 [experts + 1])."""
    flat = local.flatten()
    flat = torch.where(flat < 0, experts, flat)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return flat.argsort(stable=True)[: int(offsets[-1])], offsets


def _nothing(x: Tensor, n: int) -> Tensor:
    return x.new_zeros(*x.shape[:-1], n)
