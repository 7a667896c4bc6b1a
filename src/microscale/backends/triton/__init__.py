"""One source of kernels for CUDA, ROCm and XPU: every format, exact in the weights, activations in 16 or 32 bits.

`layout` packs and unpacks, `decode` turns codes and scales into numbers in registers, `gemm` has the loop over K and
linear, `moe` the experts and their routing, `tiles` the sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends import emulation
from microscale.backends.triton import gemm
from microscale.backends.triton import moe as experts
from microscale.backends.triton.layout import Packed, pack, unpack
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.operands import check_linear, check_moe

__all__ = ["Packed", "linear", "moe", "pack", "unpack"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear(x: Tensor, w: Packed, bias: Tensor | None = None, *, act: Format | None = None) -> Tensor:
    """See `contract.Contract.linear`.

    Numerics: float32 accumulation, scale blocks in ascending K; a row's result depends on no other row, to the bit.
    """
    check_linear(x, w.shape, bias)
    _check(x, act)

    def fast(x: Tensor, bias: Tensor | None) -> Tensor:
        n, k = w.shape
        rows = x.reshape(-1, k)
        if rows.shape[0] == 0 or n == 0:
            return x.new_zeros(*x.shape[:-1], n)
        return gemm.linear(rows, w, bias).view(*x.shape[:-1], n)

    def slow(x: Tensor, bias: Tensor | None) -> Tensor:
        return emulation.linear(x, emulation.Packed(unpack(w)), bias)

    return _run(fast, slow, x, bias)


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Packed,
    w2: Packed,
    activation: Activation,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    expert_map: Tensor | None = None,
    weight_on_input: bool = False,
    act: Format | None = None,
) -> Tensor:
    """See `contract.Contract.moe`. Never waits for the device: a token with an id out of range becomes NaN.

    Numerics: as `linear`; the intermediate is rounded once to x's dtype, and the sum over experts is float32.
    """
    check_moe(x, topk_ids, topk_weights, w13.shape, w2.shape, activation, b13, b2, weight_on_input)
    _check(x, act)

    def fast(x: Tensor, topk_weights: Tensor, b13: Tensor | None, b2: Tensor | None) -> Tensor:
        if 0 in (topk_ids.numel(), *w13.shape, *w2.shape):
            return x.new_zeros(x.shape[0], w2.shape[1])
        return experts.moe(
            x, topk_ids, topk_weights, w13, w2, activation, b13, b2, expert_map, weight_on_input
        )

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
        )

    return _run(fast, slow, x, topk_weights, b13, b2)


def _check(x: Tensor, act: Format | None) -> None:
    if act is not None:
        raise BackendError(f"triton does not quantise activations yet, and {act.name} is asked for")
    if x.dtype not in _DTYPES:
        raise BackendError(f"triton takes bf16, fp16 and fp32 activations, not {x.dtype}")


class _Recomputed(torch.autograd.Function):
    """The kernel's result forwards; backwards the gradient of emulation's, on the same numbers."""

    @staticmethod
    def forward(ctx: Any, fast: Callable[..., Tensor], slow: Callable[..., Tensor], *args: Any) -> Tensor:
        ctx.slow = slow
        ctx.save_for_backward(*args)
        return fast(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            args = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            y = ctx.slow(*args)
        wanted = [t for t, need in zip(args, needed, strict=True) if t is not None and need]
        found = iter(torch.autograd.grad(y, wanted, grads, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in needed))


def _run(fast: Callable[..., Tensor], slow: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args):
        result: Tensor = _Recomputed.apply(fast, slow, *args)  # type: ignore[no-untyped-call]
        return result
    return fast(*args)
