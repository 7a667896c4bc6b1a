"""Layers that hold quantised weights and call the chosen backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from microscale.activations import Activation
from microscale.canary import DTYPE_WORDS, Placement, Placer
from microscale.errors import BackendError
from microscale.formats import Format, activation_format, activation_word
from microscale.machine import Machine
from microscale.oracle import Problem
from microscale.quant import QuantTensor


def device_kind(device: torch.device) -> str:
    """The oracle's word for a torch device: AMD GPUs are "cuda" to torch, and "rocm" here."""
    return "rocm" if device.type == "cuda" and torch.version.hip else device.type


def dtype_word(dtype: torch.dtype) -> str:
    """The oracle's word for an activation dtype.

    Raises:
        BackendError: a dtype that no backend takes.
    """
    if dtype not in DTYPE_WORDS:
        raise BackendError(f"activations are {dtype}; microscale runs {', '.join(DTYPE_WORDS.values())}")
    return DTYPE_WORDS[dtype]


# Path components of linears that choose experts: tiny, and an error there changes which expert runs.
ROUTER_NAMES = frozenset({"router", "gate", "shared_expert_gate"})


class QuantLinear(nn.Module):
    """A linear layer whose weight stays packed.

    Attributes:
        weight_codes, weight_scales, weight_tensor_scale: the parts of the `QuantTensor`, as buffers.
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

    @property
    def weight(self) -> QuantTensor:
        """The canonical weight, as views of the buffers."""
        shape = (self.out_features, self.in_features)
        return QuantTensor(
            self.format, shape, self.weight_codes, self.weight_scales, self.weight_tensor_scale, self.rule
        )

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

    def place(self, dtype: torch.dtype) -> Placement:
        """Choose, pack and prove, for activations of `dtype`."""
        problem = self.problem(dtype, self.placer.machine)
        self.placement = self.placer.linear(problem, self.weight)
        return self.placement

    def __getstate__(self) -> dict[str, Any]:
        """Copies are placed anew: a packed layout may alias the weights it was made from."""
        return self.__dict__ | {"placement": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.placement = None  # codes may move to another device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in x's dtype."""
        placement = self.placement or self.place(x.dtype)
        return placement.backend.linear(x, placement.packed[0], self.bias, act=self.act)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        backend = "not placed" if self.placement is None else self.placement.choice.backend.name
        return f"{self.in_features} -> {self.out_features}, {self.format.name}, {backend}"


class ExpertWeights(NamedTuple):
    """What an experts module holds: w13 [E, rows, H], w2 [E, H, I], and biases [E, rows], [E, H] or None."""

    w13: QuantTensor
    w2: QuantTensor
    b13: Tensor | None
    b2: Tensor | None


class QuantExperts:
    """Runs the experts of one MoE layer. Not a module: the host model's own module keeps the parameters.

    Attributes:
        module: the host's module; it keeps the weights.
        read: gives its weights as they are now (they may have moved to another device).
        activation: between the two products.
        top_k: experts per token, for the oracle.
        act: the format that activations are quantised to; None: they stay 16-bit.
        placement: what runs it; made on the first call, and again after the weights moved.
    """

    def __init__(
        self,
        module: nn.Module,
        read: Callable[[nn.Module], ExpertWeights],
        activation: Activation,
        top_k: int,
        placer: Placer,
        act: str = "a16",
    ) -> None:
        self.module = module
        self.read = read
        self.activation = activation
        self.top_k = top_k
        self.placer = placer
        self.format = self.weights.w13.format
        self.act: Format | None = activation_format(self.format.name, act)
        self.placement: Placement | None = None
        self._placed_on: torch.device | None = None
        self._biases: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def weights(self) -> ExpertWeights:
        """The weights, as views of the module's tensors."""
        return self.read(self.module)

    def __getstate__(self) -> dict[str, Any]:
        """Copies are placed anew: a packed layout may alias the weights it was made from."""
        return self.__dict__ | {"placement": None}

    def problem(self, dtype: torch.dtype, machine: Machine) -> Problem:
        """What the oracle is asked."""
        weights = self.weights
        experts, hidden, intermediate = weights.w2.shape
        return Problem(
            op="moe",
            weight=self.format.name,
            n=hidden,
            k=weights.w13.shape[-1],
            act=activation_word(self.act),
            dtype=dtype_word(dtype),
            intermediate=intermediate,
            experts=experts,
            top_k=self.top_k,
            activation=self.activation,
            bias=weights.b13 is not None or weights.b2 is not None,
        ).on(machine, device_kind(weights.w13.device))

    def place(self, dtype: torch.dtype) -> Placement:
        """Choose, pack and prove, for activations of `dtype`."""
        weights = self.weights
        self._biases = weights.b13, weights.b2
        self.placement = self.placer.moe(self.problem(dtype, self.placer.machine), *weights)
        self._placed_on = weights.w13.device
        return self.placement

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[..., H], [M, T], [M, T] -> [..., H], with M the product of x's leading dimensions."""
        placement = self.placement
        if placement is None or self._placed_on != x.device:
            placement = self.place(x.dtype)
        w13, w2 = placement.packed
        b13, b2 = self._biases
        y = placement.backend.moe(
            x.reshape(-1, x.shape[-1]),
            topk_ids,
            topk_weights,
            w13,
            w2,
            self.activation,
            b13=b13,
            b2=b2,
            act=self.act,
        )
        return y.view(*x.shape[:-1], y.shape[-1])


def runner_of(module: nn.Module) -> QuantLinear | QuantExperts | None:
    """What runs a module's quantised weights: a linear itself, or what an experts module was given; None: neither."""
    if isinstance(module, QuantLinear):
        return module
    runner = getattr(module, "microscale", None)
    return runner if isinstance(runner, QuantExperts) else None
