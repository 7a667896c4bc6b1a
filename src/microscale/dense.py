"""Linears whose weights are not quantised, and whose products of few rows the C++ core computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microscale.backends import autograd
from microscale.backends.dense_rules import CORE
from microscale.canary import DTYPE_WORDS, Placement, Placer, device_kind, dtype_word
from microscale.machine import Machine
from microscale.oracle import Problem

# So many rows are few: for more, PyTorch's product, which puts weights into an order of its own first, is as fast
# (bench/dense.py), and the core's would read them twice.
ROWS = 8


class DenseModule(nn.Module):
    """What a module gets that multiplies by `weight` [N, K] and adds `bias` [N] or None.

    Attributes:
        placement: who computes products of few rows, and why; proved when the module was placed.
        rows: how many are few; 0: none, the canary failed.
        core: `cpu_core.dense`, held here because the core may be absent where this is imported.
    """

    weight: Tensor
    bias: Tensor | None
    placement: Placement
    rows: int
    core: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def product(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N].

        Whatever the core is not made for goes to `F.linear`, with its errors: many rows, gradients, autocast, other
        devices and dtypes, subclasses of tensors.
        """
        w, bias = self.weight, self.bias
        if _few(x, w, bias, self.rows):
            if not torch.compiler.is_compiling():
                if not autograd.watched(x, w, bias):
                    return self.core(x, w, bias)
            elif not torch.is_grad_enabled():
                from microscale import ops

                y: Tensor = ops.dense(x, w, bias)
                return y
        return F.linear(x, w, bias)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        who = self.placement.choice.backend.name
        return f"{super().extra_repr()}, {who}" + (f" up to {self.rows} rows" if self.rows else "")


class DenseLinear(DenseModule, nn.Linear):  # type: ignore[misc]
    """An nn.Linear in all but its forward: the same parameters under the same names, wherever they lie."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self.product(input)


def _few(x: Tensor, w: Tensor, bias: Tensor | None, rows: int) -> bool:
    return (
        x.dim() > 0
        and x.shape[-1] == w.shape[1]
        and x.numel() <= rows * w.shape[1]
        and x.dtype is w.dtype
        and x.dtype in DTYPE_WORDS
        and (bias is None or (bias.dtype is x.dtype and bias.is_cpu and bias.shape == w.shape[:1]))
        and x.is_cpu
        and w.is_cpu
        and w.stride(1) == 1
        and not torch.is_autocast_enabled("cpu")
    )


def dense_problem(module: Any, dtype: torch.dtype, machine: Machine) -> Problem:
    """What the oracle is asked about a module whose weight [N, K] is not quantised, for activations of `dtype`."""
    w = module.weight
    n, k = w.shape
    weight = DTYPE_WORDS.get(w.dtype, str(w.dtype).removeprefix("torch."))
    problem = Problem("linear", weight, n, k, dtype=dtype_word(dtype), bias=module.bias is not None)
    return problem.on(machine, device_kind(w.device))


def place_dense(module: nn.Module, made: type[DenseModule], dtype: torch.dtype, placer: Placer) -> None:
    """Make a module a `made`, if the core takes its product: it keeps its parameters, names and hooks."""
    problem = dense_problem(module, dtype, placer.machine)
    if placer.refuses_dense(problem):
        return
    host: Any = module
    w, bias = host.weight.detach(), None if host.bias is None else host.bias.detach()
    placement = placer.dense(problem, w, bias)
    host.__class__ = made
    host.placement, host.rows, host.core = placement, 0, F.linear
    if placement.choice.backend is CORE:
        host.rows, host.core = ROWS, placement.backend.dense  # type: ignore[attr-defined]
