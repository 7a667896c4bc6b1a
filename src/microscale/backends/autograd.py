"""Gradients for kernels that have none of their own: those of emulation, on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


def wanted(*args: Tensor | None) -> bool:
    """Whether a gradient of any of these is asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args)


def recorded() -> bool:
    """Whether somebody notes which of torch's operators run, and would not see what runs behind them."""
    return torch.compiler.is_compiling() or _traced()


def watched(*args: Tensor | None) -> bool:
    """Whether somebody must see torch's own operators: autograd, a tracer, a mode, or a subclass of Tensor."""
    return (
        wanted(*args)
        or any(t is not None and (type(t) not in (Tensor, torch.nn.Parameter) or t.is_neg()) for t in args)
        or _traced()
        or _transformed()
    )


def plain(*args: Tensor | None) -> bool:
    """Whether these are no more than the numbers at their addresses, so that a kernel alone gives all of a result.

    Not so: a gradient is asked for, a transform of functions is under way, or a sign is still to be turned.
    """
    return not (wanted(*args) or _transformed() or any(t is not None and t.is_neg() for t in args))


def _traced() -> bool:
    """By a tracer or a mode."""
    return torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0


def _transformed() -> bool:
    """By `torch.func` (vmap, jvp, grad ...), or by forward mode, whose tangents no kernel sees."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(fast: Callable[..., Tensor], slow: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """`run`, where torch.compile breaks its graph: it cannot see into either."""
    return run(fast, slow, *args)


@contextmanager
def untransformed() -> Iterator[None]:
    """Tensors made within are memory, which under a transform of `torch.func` they are not."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def run(fast: Callable[..., Tensor], slow: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """`fast(*args)`; its gradient, where one is asked for, is that of `slow(*args)`. Transforms see `slow` itself."""
    if torch.compiler.is_compiling():
        if wanted(*args) and not torch.compiler.is_exporting():  # what is exported infers, and is one graph
            uncompiled: Tensor = _uncompiled(fast, slow, *args)
            return uncompiled
        return fast(*args)
    if plain(*args):
        return fast(*args)
    if _transformed():
        return slow(*args)
    args = tuple(None if t is None else t.resolve_neg() for t in args)
    if wanted(*args):
        result: Tensor = _Recomputed.apply(fast, slow, *args)  # type: ignore[no-untyped-call]
        return result
    return fast(*args)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Products of float32 numbers stay such: a layer computes in its input's dtype, whatever autocast is on."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    off: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return off


class _Recomputed(torch.autograd.Function):
    """The kernel's result forwards; backwards the gradient of emulation's, on the same numbers.

    That gradient has none of its own, and says so where one is asked for.
    """

    @staticmethod
    def forward(ctx: Any, fast: Callable[..., Tensor], slow: Callable[..., Tensor], *args: Any) -> Tensor:
        ctx.slow = slow
        ctx.save_for_backward(*args)
        return fast(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            args = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            y = ctx.slow(*args)
        asked = [t for t, need in zip(args, needed, strict=True) if t is not None and need]
        with without_autocast(y.device):
            found = iter(torch.autograd.grad(y, asked, grads, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in needed))
