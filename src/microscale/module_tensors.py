"""The tensors that a module has just now, which others may replace, for good or for a call; and copies of biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from microscale.errors import BackendError

Parts = tuple[Tensor | None, ...]
Read = TypeVar("Read")


def same(a: Parts, b: Parts) -> bool:
    """One by one the same objects."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def given(now: Parts, before: Parts) -> bool:
    """Whether a module has been given other tensors, with numbers to be computed with, than it had before.

    Raises:
        BackendError: their numbers are not to be had: a transform of torch.func is about to map over them.
    """
    if same(now, before) or any(type(t).__name__ in ("FakeTensor", "FunctionalTensor") for t in now):
        return False  # the latter stand in an export for those that the module has
    if torch.compiler.is_compiling():
        return True
    if any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in now):
        raise BackendError(
            "weights under a transform of torch.func (vmap) have no numbers yet, which are packed"
        )
    return True


def tensors_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own parameters and buffers."""
    return {**module._parameters, **module._buffers}


def put(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    """Give a module these in the place of those that it has under their names."""
    for name, t in tensors.items():
        if name not in module._parameters:
            module._buffers[name] = t
        elif t is None or isinstance(t, nn.Parameter):
            module._parameters[name] = t
        else:
            module._parameters[name] = nn.Parameter(t, requires_grad=False)


def filled(module: nn.Module, whole: Mapping[str, Tensor], read: Callable[[nn.Module], Read]) -> Read:
    """What `read` makes of a module that has its tensor of `whole` wherever its own is empty."""
    now = tensors_of(module)
    empty = {name: now[name] for name in whole if (own := now[name]) is None or not own.numel()}
    put(module, {name: whole[name] for name in empty})
    try:
        return read(module)
    finally:
        put(module, empty)


def other_kinds(
    module: nn.Module, names: Sequence[str], state: Mapping[str, object], prefix: str
) -> list[str]:
    """A sentence for each tensor of a state that torch would load number by number, where bits are kept as integers."""
    found, now = [], tensors_of(module)
    for name in names:
        t, given = now.get(name), state.get(prefix + name)
        if t is None or not isinstance(given, Tensor) or given.dtype == t.dtype:
            continue
        if not (t.is_floating_point() and given.is_floating_point()):
            hint = f"; .view({t.dtype}) if these are the bits" if given.itemsize == t.itemsize else ""
            found.append(f"{prefix}{name} is {t.dtype}, and the state has {given.dtype}{hint}")
    return found


def nothing(t: Tensor) -> Tensor:
    """Of t's kind, without its numbers."""
    return torch.zeros(0, dtype=t.dtype, device=t.device)


class Bias:
    """A bias, and its float32 copy for inference: to convert all experts' takes longer than to add those of a few."""

    def __init__(self) -> None:
        self.copy: Tensor | None = None
        self.of: tuple[Tensor, Tensor, int] | None = None  # what was copied, its memory then, and its version

    def now(self, b: Tensor | None) -> Tensor | None:
        """The bias as it is, float32 where no gradient of it can be asked for."""
        if b is None or b.dtype == torch.float32 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return b
        if b.is_inference() or type(b) not in (Tensor, nn.Parameter):  # changes leave no trace
            return b
        if self.of is not None:
            source, memory, version = self.of
            if source is b and version == b._version and memory.data_ptr() == b.data_ptr():
                return self.copy
        self.copy, self.of = b.detach().float(), (b, b.detach(), b._version)
        return self.copy
