"""Layers that hold quantised weights and call the chosen backend: linears, and what runs a module's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from microscale.canary import Placement, Placer, device_kind, dtype_word
from microscale.errors import BackendError
from microscale.formats import activation_format, activation_word
from microscale.machine import Machine
from microscale.module_tensors import Parts, given, nothing, other_kinds, same
from microscale.oracle import Problem
from microscale.pages import give_back
from microscale.placing import placing
from microscale.quant import QuantTensor
from microscale.quant_experts import QuantExperts, experts_of

_PARTS = ("weight_codes", "weight_scales", "weight_tensor_scale")


class QuantLinear(nn.Module):
    """A linear layer whose weight stays packed.

    Attributes:
        weight_codes, weight_scales, weight_tensor_scale: the parts of the `QuantTensor`, as buffers. While the layer
            is placed on a backend that repacks, codes and scales are empty; `weight` and state dicts are whole.
        bias: as in nn.Linear.
        act: the format that activations are quantised to; None: they stay 16-bit.
        placement: what runs it; made on the first call, and again after the layer moved to another device.
    """

    weight_codes: Tensor
    weight_scales: Tensor
    weight_tensor_scale: Tensor | None

    def __init__(self, weight: QuantTensor, bias: Tensor | None, placer: Placer, act: str = "a16") -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise BackendError(f"a linear layer's weight is [N, K], not {weight.shape}")
        self.out_features, self.in_features = weight.shape
        self.format = weight.format
        self.rule = weight.rule
        self.act = activation_format(weight.format.name, act)
        self.register_buffer("weight_codes", weight.codes)
        self.register_buffer("weight_scales", weight.scales)
        self.register_buffer("weight_tensor_scale", weight.tensor_scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.placer = placer
        self.placement: Placement | None = None
        self._made_of: Parts = ()  # the buffers that the placement was made of, emptied or not
        self._held: Placement | None = None  # whose packed form is the only copy of the weight
        self._emptied: Parts = ()  # the buffers that it stands behind

    @property
    def weight(self) -> QuantTensor:
        """The canonical weight: views of the buffers, or unpacked from what the backend holds."""
        codes, scales = self.weight_codes, self.weight_scales
        if self._held is not None:
            (whole,) = self._held.unpack()
            codes = whole.codes if codes is self._emptied[0] else codes
            scales = whole.scales if scales is self._emptied[1] else scales
        shape = (self.out_features, self.in_features)
        return QuantTensor(self.format, shape, codes, scales, self.weight_tensor_scale, self.rule)

    def _parts(self) -> Parts:
        held = self._buffers  # what is not among them is parametrized
        return tuple(held[name] if name in held else getattr(self, name) for name in _PARTS)

    def problem(self, dtype: torch.dtype, machine: Machine) -> Problem:
        """What the oracle is asked."""
        return Problem(
            op="linear",
            weight=self.format.name,
            n=self.out_features,
            k=self.in_features,
            act=activation_word(self.act),
            dtype=dtype_word(dtype),
            bias=self.bias is not None,
        ).on(machine, device_kind(self.weight_codes.device))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def place(self, dtype: torch.dtype) -> Placement:
        """Choose, pack and prove, for activations of `dtype`."""
        problem, weight = self.problem(dtype, self.placer.machine), self.weight
        placement = self.placer.linear(problem, weight)
        self._store(weight.codes, weight.scales, None)
        if placement.repacks:
            give_back((weight.codes, weight.scales))
            self._store(nothing(weight.codes), nothing(weight.scales), placement)
        self.placement, self._made_of = placement, self._parts()
        return placement

    def placed(self, dtype: torch.dtype) -> Placement:
        """The placement of the weight that the layer has now, made if there is none."""
        made_of, placement = self._made_of, self.placement  # another thread writes them the other way round
        if given(self._parts(), made_of) or placement is None:
            self._settle(dtype)
            placement = self.placement
        assert placement is not None
        return placement

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self, dtype: torch.dtype) -> None:
        """Place what the layer has now, unless another thread just did."""
        with placing():
            if self.placement is None:
                self.place(dtype)
            elif given(self._parts(), self._made_of):
                self._place_given(dtype)

    def _place_given(self, dtype: torch.dtype) -> None:
        """For other parts than were placed. They may be there for a call only, so they stay as they are."""
        parts = self._parts()
        if self._held is not None and same(parts, self._emptied):
            placement = self._held
        else:
            placement = self.placer.linear(self.problem(dtype, self.placer.machine), self.weight)
        self.placement, self._made_of = placement, parts

    def __setattr__(self, name: str, value: Any) -> None:
        """Given another part of a weight, the layer is placed anew."""
        if name in _PARTS and name in self._buffers:
            self._take_back()
        super().__setattr__(name, value)

    def _store(self, codes: Tensor, scales: Tensor, held: Placement | None) -> None:
        """Step by step such that the weight is whole for other threads, and after an interrupt."""
        if held is not None:
            self._emptied = codes, scales, *self._parts()[2:]
            self._held = held
        self._buffers["weight_codes"] = codes
        self._buffers["weight_scales"] = scales
        if held is None:
            self._held, self._emptied = None, ()

    def _take_back(self) -> None:
        """The buffers hold the weight again, and the layer is not placed."""
        if self._held is not None:
            weight = self.weight
            self._store(weight.codes, weight.scales, None)
        self.placement, self._made_of = None, ()

    def __getstate__(self) -> dict[str, Any]:
        """Copies are placed anew: a packed layout may alias the weights it was made from."""
        state = self.__dict__ | {"placement": None, "_made_of": (), "_held": None, "_emptied": ()}
        state["_buffers"] = dict(self._buffers)
        if self._held is not None:
            weight = self.weight
            state["_buffers"] |= {"weight_codes": weight.codes, "weight_scales": weight.scales}
        return state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._held is not None:
            weight = self.weight
            destination[f"{prefix}weight_codes"] = weight.codes
            destination[f"{prefix}weight_scales"] = weight.scales

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self._take_back()
        *_, errors = args
        if wrong := other_kinds(self, _PARTS, state, prefix):
            errors += wrong
        else:
            super()._load_from_state_dict(state, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._take_back()  # codes may move to another device
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, t in before.items():
            now = self._buffers[name]
            if t is not None and now is not None and now.dtype != t.dtype:
                # `to(dtype)` means numbers that are computed with; scales that it rounds would never come back.
                self._buffers[name] = t.to(now.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in x's dtype."""
        placement = self.placed(x.dtype)
        return placement.backend.linear(x, placement.packed[0], self.bias, act=self.act)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        backend = "not placed" if self.placement is None else self.placement.choice.backend.name
        return f"{self.in_features} -> {self.out_features}, {self.format.name}, {backend}"


def runner_of(module: nn.Module) -> QuantLinear | QuantExperts | None:
    """What runs a module's quantised weights: a linear itself, or what an experts module was given; None: neither."""
    if isinstance(module, QuantLinear):
        return module
    return experts_of(module)
