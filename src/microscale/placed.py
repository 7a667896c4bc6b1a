"""A model's layer classes on a machine: the oracle's answer for each, and what a generated token makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from microscale.backends.cpu_rules import refuse_device
from microscale.backends.dense_rules import CORE, HOST, TOKEN, choose_dense
from microscale.backends.token_rules import refuse_layer
from microscale.backends.triton_rules import refuse_steps
from microscale.errors import NoBackendError
from microscale.layer_classes import CORE_NORMS, OTHERS, SINKS, LayerClass
from microscale.machine import Machine
from microscale.oracle import Backend, Choice, Problem, choose


@dataclass(frozen=True)
class Placed:
    """A layer class on a machine.

    Attributes:
        problem: with the machine's facts; None: nothing to choose.
        choice: None: nothing to choose, or every backend refused. Of layers that follow others, those others'.
        refused: (backend, sentence), in the order tried.
        token: whose a layer is in a generated token that is one chain of kernels; None: no token is, or this layer is
            no part of the chain.
    """

    layer: LayerClass
    problem: Problem | None = None
    choice: Choice | None = None
    refused: tuple[tuple[str, str], ...] = ()
    token: Backend | None = None

    @property
    def chained(self) -> bool:
        """A generated token is a chain of kernels, and this layer is one of them, or a part of one."""
        return self.token is not None

    @property
    def token_backend(self) -> str | None:
        """The name of what runs it for a generated token; `backend` says it of a prompt, and mostly of both."""
        return self.backend if self.token is None else self.token.name

    @property
    def backend(self) -> str | None:
        """The name of what runs it; None: nothing does."""
        if self.choice is not None:
            return self.choice.backend.name
        return HOST if self.layer.problem is None else None


@dataclass(frozen=True)
class Unchained:
    """What of a model keeps its tokens from being chains of kernels, in sentences; None: nothing does.

    Attributes:
        replay: no step of it is taken twice, on whatever device.
        cuda: what a chain of Triton's kernels does not know.
        cpu: what a chain of the C++ core's does not.
    """

    replay: str | None = None
    cuda: str | None = None
    cpu: str | None = None


def place(
    layer: LayerClass, machine: Machine, device: str, backend: str | None, backends: Sequence[Backend]
) -> Placed:
    """The oracle's answer; `backend`: the only one allowed."""
    if layer.problem is None:
        return Placed(layer)
    problem = layer.problem.on(machine, device)
    try:
        choice = choose(problem, backends, backend) if layer.quantised else choose_dense(problem, backend)
    except NoBackendError as error:
        return Placed(layer, problem, None, error.refused)
    return Placed(layer, problem, choice, choice.refused)


def chain(
    placed: Sequence[Placed], machine: Machine, device: str, known: Unchained
) -> tuple[Sequence[Placed], str | None]:
    """The layers of a model, with who runs them for a generated token; and why that is no chain, where it could be."""
    tokens: list[Backend | None]
    if device == "cpu":
        why = known.replay or refuse_device(device, bool(machine.core)) or known.cpu or _refuse_layers(placed)
        tokens = [p.choice.backend if p.layer.quantised and p.choice else CORE for p in placed]
    elif device in ("cuda", "rocm"):
        arch = next((g.arch for g in machine.gpus if g.kind == device), "")
        why = known.replay or refuse_steps(device, arch, dict(machine.packages)) or known.cuda
        tokens = [TOKEN if _tritons(p) else None for p in placed]
    else:
        return placed, None
    if why is not None:
        return placed, why
    return [replace(p, token=token) for p, token in zip(placed, tokens, strict=True)], None


def _refuse_layers(placed: Sequence[Placed]) -> str | None:
    """In the order in which the chain would come to them, experts behind attention."""
    for p in sorted(placed, key=lambda p: p.layer.name.startswith("experts")):
        if p.problem is not None:
            why = refuse_layer(_words(p.layer), p.backend, p.problem.act)
            if why is not None:
                return why
    return None


def _words(layer: LayerClass) -> str:
    """As `integrations.hf.cpu_parts` calls it."""
    if layer.name.startswith("experts"):
        return "its experts"
    if layer.quantised:
        return "a linear in it"
    return "its router" if layer.name == "router" else "a Linear in it"


def _tritons(p: Placed) -> bool:
    """Whether a layer of a model that is stepped by a chain of kernels is Triton's there, whatever runs prompts."""
    if p.problem is None:
        return p.layer.name in (CORE_NORMS, SINKS, OTHERS, "router")
    return not p.layer.quantised and TOKEN.refuse(p.problem) is None
