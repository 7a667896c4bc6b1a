"""What runs the quantised experts of a module that is not ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from microscale.activations import Activation
from microscale.canary import Placement, Placer, device_kind, dtype_word
from microscale.experts_host import ExpertsHost, ExpertWeights
from microscale.formats import Format, activation_format, activation_word
from microscale.machine import Machine
from microscale.module_tensors import Bias, Parts, filled, given, nothing, other_kinds, put, same, tensors_of
from microscale.oracle import Problem
from microscale.pages import give_back
from microscale.placing import placing
from microscale.quant import QuantTensor


class QuantExperts:
    """Runs the experts of one MoE layer. Not a module: the host model's own module keeps the parameters.

    Attributes:
        module: the host's module; it keeps the weights. While they are placed on a backend that repacks, its tensors
            are empty; `weights` and state dicts are whole.
        host: how the module stores them.
        activation: between the two products.
        top_k: experts per token, for the oracle.
        act: the format that activations are quantised to; None: they stay 16-bit.
        placement: what runs it; made on the first call, and again after the weights moved.
    """

    def __init__(
        self,
        module: nn.Module,
        host: ExpertsHost,
        activation: Activation,
        top_k: int,
        placer: Placer,
        act: str = "a16",
    ) -> None:
        self.module = module
        self.host = host
        self.activation = activation
        self.top_k = top_k
        self.placer = placer
        self._held: Placement | tuple[QuantTensor, QuantTensor] | None = None  # the only copy, if any
        w13, w2 = host.weights(module)
        self.format = w13.format
        self.act: Format | None = activation_format(self.format.name, act)
        self.placement: Placement | None = None
        self._names = tuple(host.parts(module, w13, w2))
        biases = [id(b) for b in host.biases(module)]
        self._read = tuple(n for n, t in tensors_of(module).items() if t is not None and id(t) not in biases)
        self._made_of: Parts = ()  # what `_read` named when the placement was made, emptied or not
        self._emptied: Parts = ()  # the same of what `_held` stands behind
        self._placed_on: torch.device | None = None
        self._biases = Bias(), Bias()
        if experts_of(module) is None:
            module.register_state_dict_post_hook(_complete_state)
            module.register_load_state_dict_pre_hook(_before_loading)

    @property
    def device(self) -> torch.device:
        """Where the module's tensors are, empty or not."""
        device: torch.device = getattr(self.module, self._names[0]).device
        return device

    @property
    def weights(self) -> ExpertWeights:
        """The weights: views of the module's tensors, or unpacked from what the backend holds."""
        held = self._held
        if held is None:
            w13, w2 = self.host.weights(self.module)
        else:
            whole = held.unpack() if isinstance(held, Placement) else held
            w13, w2 = (w.to(self.device) for w in whole)
            if not same(self._parts(), self._emptied):  # given others since
                parts = self.host.parts(self.module, w13, w2)
                w13, w2 = filled(self.module, parts, self.host.weights)
        return ExpertWeights(w13, w2, *self.host.biases(self.module))

    def _parts(self) -> Parts:
        now = tensors_of(self.module)
        return tuple(now.get(name) for name in self._read)

    def parts(self) -> dict[str, Tensor]:
        """The module's tensors by name, whole."""
        return self.host.parts(self.module, *self.weights[:2])

    def __getstate__(self) -> dict[str, Any]:
        """Copies are placed anew: a packed layout may alias the weights it was made from."""
        held = None if self._held is None else self.weights[:2]
        return self.__dict__ | {"placement": None, "_made_of": (), "_held": held, "_biases": (Bias(), Bias())}

    def problem(self, dtype: torch.dtype, machine: Machine, weights: ExpertWeights | None = None) -> Problem:
        """What the oracle is asked; `weights`: the layer's own, where they are at hand."""
        weights = self.weights if weights is None else weights
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
        placement = self.placer.moe(self.problem(dtype, self.placer.machine, weights), *weights)
        whole = self.host.parts(self.module, weights.w13, weights.w2)
        if placement.repacks:
            give_back(whole.values())
            self._store({name: nothing(t) for name, t in whole.items()}, placement)
        else:
            self._store(whole, None)
        self._biases = Bias(), Bias()
        self._placed_on = weights.w13.device
        self.placement, self._made_of = placement, self._parts()
        return placement

    def placed(self, dtype: torch.dtype, device: torch.device) -> Placement:
        """The placement of the weights that the module has now, made if there is none for activations there."""
        made_of, placement = self._made_of, self.placement  # another thread writes them the other way round
        if given(self._parts(), made_of) or placement is None or self._placed_on != device:
            self._settle(dtype, device)
            placement = self.placement
        assert placement is not None
        return placement

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self, dtype: torch.dtype, device: torch.device) -> None:
        """Place what the module has now, unless another thread just did."""
        with placing():
            if self.placement is None or self._placed_on != device:
                self.place(dtype)
            elif given(self._parts(), self._made_of):
                self._place_given(dtype)

    def _place_given(self, dtype: torch.dtype) -> None:
        """For other parts than were placed. They may be there for a call only, so they stay as they are."""
        parts = self._parts()
        if isinstance(self._held, Placement) and same(parts, self._emptied):
            placement = self._held
        else:
            weights = self.weights
            placement = self.placer.moe(self.problem(dtype, self.placer.machine, weights), *weights)
        self.placement, self._made_of = placement, parts

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """(b13, b2) as they are now, float32 where no gradient of them can be asked for.

        A change in place behind torch's back (`bias.data.add_(...)`) leaves no trace that could be seen here.
        """
        kept13, kept2 = self._biases
        b13, b2 = self.host.biases(self.module)
        return kept13.now(b13), kept2.now(b2)

    def _store(self, parts: dict[str, Tensor], held: Placement | None) -> None:
        """Step by step such that the weights are whole for other threads, and after an interrupt."""
        if held is not None:
            self._held, self._emptied = held, ()
        if self._held is not None:
            put(self.module, parts)
        self._held, self._emptied = held, () if held is None else self._parts()

    def take_back(self) -> None:
        """The module holds its weights again, and they are not placed."""
        if self._held is not None:
            self._store(self.parts(), None)
        self.placement, self._made_of = None, ()

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[..., H], [M, T], [M, T] -> [..., H], with M the product of x's leading dimensions."""
        rows, placement = x.reshape(-1, x.shape[-1]), self.placed(x.dtype, x.device)
        y = self._run(placement.backend.moe, placement, rows, topk_ids, topk_weights)
        return y.view(*x.shape[:-1], y.shape[-1])

    def shares(self, x: Tensor, choice: Any) -> Tensor | None:
        """What a call adds up, [M, H] -> [M, T, H], or None: the backend has its sums alone.

        Args:
            choice: of the routes, `backends.triton.small.Choice`.
        """
        placement = self.placed(x.dtype, x.device)
        run = getattr(placement.backend, "shares", None)
        return None if run is None else self._run(run, placement, x, choice)

    def _run(self, function: Callable[..., Tensor], placement: Placement, *given: Any) -> Tensor:
        w13, w2 = placement.packed
        b13, b2 = self.biases()
        return function(*given, w13, w2, self.activation, b13=b13, b2=b2, act=self.act)


def _complete_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    runner = experts_of(module)
    if runner is not None and runner._held is not None:
        state.update({prefix + name: t for name, t in runner.parts().items() if prefix + name in state})


def _before_loading(module: nn.Module, state: Any, prefix: str, *args: Any) -> None:
    runner = experts_of(module)
    if runner is not None:
        runner.take_back()
        *_, errors = args
        errors += other_kinds(module, runner._read, state, prefix)


def experts_of(module: nn.Module) -> QuantExperts | None:
    """What an experts module was given to run it, if it was."""
    runner = getattr(module, "microscale", None)
    return runner if isinstance(runner, QuantExperts) else None
