"""nn.Linear with its own 16-bit weights, whose products of few rows the C++ core computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microscale.backends.dense_rules import CORE, choose_dense
from microscale.canary import DTYPE_WORDS, Placement, Placer
from microscale.machine import Machine
from microscale.nn import device_kind, dtype_word
from microscale.oracle import Problem

# Rows above which PyTorch's product, which copies weights into an order of its own first, is the faster one; by
# measurement (bench/dense.py), and never more than the core reads the weights once for.
ROWS = {"avx2": 3, "avx512": 4, "avx512_bf16": 8, "amx": 8}


class DenseLinear(nn.Linear):
    """An nn.Linear in all but its forward: the same parameters under the same names, wherever they lie.

    Whatever the core is not made for goes to `F.linear`, with its errors: many rows, gradients, autocast, other
    devices and dtypes, subclasses of tensors.

    Attributes:
        placement: who computes products of few rows, and why; proved when the layer was placed.
        rows: how many are few.
        product: `cpu_core.dense`, held here because the core may be absent where this is imported.
    """

    placement: Placement
    rows: int
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        w, bias = self.weight, self.bias
        if torch.compiler.is_compiling():
            if self._few(input) and not torch.is_grad_enabled():
                from microscale import ops

                y: Tensor = ops.dense(input, w, bias)
                return y
        elif self._few(input) and not _watched(input, w, bias):
            return self.product(input, w, bias)
        return F.linear(input, w, bias)

    def _few(self, x: Tensor) -> bool:
        w, bias = self.weight, self.bias
        k = x.shape[-1] if x.dim() else 0
        return (
            k == self.in_features
            and x.numel() <= self.rows * k
            and x.dtype is w.dtype
            and w.dtype in (torch.bfloat16, torch.float16)
            and (bias is None or bias.dtype is w.dtype)
            and x.is_cpu
            and w.is_cpu
            and w.stride(1) == 1
            and not torch.is_autocast_enabled("cpu")
        )

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{super().extra_repr()}, {self.placement.choice.backend.name} up to {self.rows} rows"


def _watched(*args: Tensor | None) -> bool:
    """Whether somebody must see the product as torch's own operator: autograd, a tracer, a mode, a subclass."""
    return (
        (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args))
        or any(t is not None and type(t) not in (Tensor, nn.Parameter) for t in args)
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def problem_of(linear: nn.Linear, dtype: torch.dtype, machine: Machine) -> Problem:
    """What the oracle is asked, for activations of `dtype`."""
    n, k = linear.weight.shape
    weight = DTYPE_WORDS.get(linear.weight.dtype, str(linear.weight.dtype).removeprefix("torch."))
    problem = Problem("linear", weight, n, k, dtype=dtype_word(dtype), bias=linear.bias is not None)
    return problem.on(machine, device_kind(linear.weight.device))


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(path, module) of the linears that are not quantised. A subclass may compute something else, so is left alone."""
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, DenseLinear):
            yield name, module  # type: ignore[misc]


def place_dense(model: nn.Module, dtype: torch.dtype, placer: Placer) -> None:
    """Let the core run those linears of a model that it takes, each distinct problem proved once.

    Modules keep their parameters, names and hooks; only their class changes.
    """
    for _, module in linears(model):
        problem = problem_of(module, dtype, placer.machine)
        if CORE.name in dict(choose_dense(problem, placer.force).refused):
            continue
        placement = placer.dense(problem, module.weight.detach(), _detached(module.bias))
        made: Any = module
        made.__class__ = DenseLinear
        made.placement, made.rows, made.product = placement, 0, F.linear
        if placement.choice.backend is CORE:
            made.rows, made.product = ROWS[problem.arch], placement.backend.dense  # type: ignore[attr-defined]


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()
