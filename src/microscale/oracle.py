"""Which backend runs this layer on this machine, and why each other one was refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from microscale.accumulation import FLOAT32, Accumulation
from microscale.activations import Activation
from microscale.errors import NoBackendError
from microscale.machine import CORE, Machine


@dataclass(frozen=True)
class Problem:
    """All that a choice may depend on: plain values, so that it can be made without the hardware.

    Attributes:
        op: "linear" or "moe".
        weight: name of the weights' format.
        act: "a16", or the name of the format that activations are quantised to.
        dtype: of the activations as they arrive: "bf16", "fp16" or "fp32".
        device: "cpu", "cuda", "rocm", "xpu", "mps".
        arch: of that device: "sm_90", "gfx942", ""; a CPU's level, see `Machine.level`.
        isa: the CPU's instruction sets.
        packages: names of the optional packages that are installed, `machine.CORE` for our own C++ core among them.
        versions: (name, version) of those that have one, and of torch.
        n, k: output and input features. MoE: the hidden size H both, with `intermediate` between.
        intermediate, experts, top_k, activation: MoE only.
        bias: there is one (MoE: on either product).
    """

    op: str
    weight: str
    n: int
    k: int
    act: str = "a16"
    dtype: str = "bf16"
    device: str = "cpu"
    arch: str = ""
    isa: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()
    versions: frozenset[tuple[str, str]] = frozenset()
    intermediate: int = 0
    experts: int = 0
    top_k: int = 0
    activation: Activation | None = None
    bias: bool = False

    def on(self, machine: Machine, device: str | None = None) -> Problem:
        """The same problem on a machine; `device` defaults to the machine's own."""
        device = device or machine.device
        arch = next((g.arch for g in machine.gpus if g.kind == device), machine.level)
        return replace(
            self,
            device=device,
            arch=arch,
            isa=machine.isa,
            packages=frozenset(name for name, _ in machine.packages)
            | ({CORE} if machine.core else frozenset()),
            versions=frozenset({*machine.packages, ("torch", machine.torch), (CORE, machine.core_level)}),
        )

    def version(self, package: str) -> str:
        """The installed version of a package; empty where it is not known."""
        return next((version for name, version in self.versions if name == package), "")

    def __str__(self) -> str:
        shape = f"N={self.n} K={self.k}"
        if self.op == "moe":
            shape = f"E={self.experts} T={self.top_k} H={self.k} I={self.intermediate}"
        where = f"{self.device} {self.arch}".strip()
        return f"{self.op} {self.weight} {self.act} {self.dtype} {shape} on {where}"


def _float32(problem: Problem) -> Accumulation:
    return FLOAT32


def _unsaid(problem: Problem) -> str:
    return ""


def _not_compared(problem: Problem) -> str | None:
    return None


def _keeps_its_place(problem: Problem) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run quantised layers.

    Attributes:
        name: the word in explanations and in `force`.
        module: imported only once chosen; see `backends.contract` for what it offers.
        refuse: None: can run the problem; otherwise one sentence why not. Cheap, total, no side effects.
        how: one line on what it does.
        proven: where it ran for us, in words; shown by `explain` so that untried hardware is not mistaken for tried.
        before: an added backend's place in the table: in front of the one of this name.
        accumulation: how the hardware that would run a problem adds up products; for the error budgets.
        arithmetic: what is multiplied, in a sentence that begins with one word: "native" (the hardware multiplies
            stored codes), "decoded" (weights become numbers of the activations' dtype first) or "emulated" (all become
            float32 numbers, and PyTorch multiplies them).
        compared: how it was faster or slower than those behind it in a problem, in a sentence; None: not measured.
        yields: why the others are asked first in a problem, emulation apart, in a sentence; None: its place is its own.
        waits: its `moe` waits for the device, to know which experts have rows, and no CUDA graph can hold it.
    """

    name: str
    module: str
    refuse: Callable[[Problem], str | None]
    how: str
    proven: str = ""
    before: str = "emulation"
    accumulation: Callable[[Problem], Accumulation] = _float32
    arithmetic: Callable[[Problem], str] = _unsaid
    compared: Callable[[Problem], str | None] = _not_compared
    yields: Callable[[Problem], str | None] = _keeps_its_place
    waits: bool = False


@dataclass(frozen=True)
class Choice:
    """The oracle's answer.

    Attributes:
        problem: what was asked.
        backend: the first in table order that did not refuse.
        refused: (name, sentence) of those before it, in the order tried.
        skipped: names behind it, which were not asked.
    """

    problem: Problem
    backend: Backend
    refused: tuple[tuple[str, str], ...]
    skipped: tuple[str, ...] = ()

    @property
    def numerics(self) -> str:
        """A sentence on what is done to the activations, and how products are added up."""
        p = self.problem
        acts = f"stay {p.dtype}" if p.act == "a16" else f"are quantised to {p.act}"
        return f"activations {acts}; {self.backend.accumulation(p).sentence}"

    @property
    def arithmetic(self) -> str:
        """A sentence on what is multiplied; empty where a backend of another package says nothing."""
        return self.backend.arithmetic(self.problem)

    @property
    def compared(self) -> str | None:
        """A sentence on how the chosen backend does beside one behind it; None: not measured."""
        return self.backend.compared(self.problem)

    def explain(self) -> str:
        """One line for the chosen backend, one on how it compares if that was measured, one for each refused one."""
        lines = [f"+ {self.backend.name}: {self.backend.how}"]
        if self.compared is not None:
            lines.append(f"  {self.compared}")
        return "\n".join(lines + [f"- {name}: {why}" for name, why in self.refused])


def check_forced(problem: object, backends: Sequence[Backend], force: str | None) -> None:
    """That a backend that is the only one allowed is in the table.

    Raises:
        NoBackendError: it is not; says which are.
    """
    if force is not None and force not in {b.name for b in backends}:
        names = ", ".join(b.name for b in backends)
        raise NoBackendError(problem, [(force, f"no backend has this name; known: {names}")])


def choose(
    problem: Problem,
    backends: Sequence[Backend],
    force: str | None = None,
    failed: Sequence[tuple[str, str]] = (),
) -> Choice:
    """The first backend, in table order, that does not refuse; those that yield come right before the last.

    Args:
        backends: the ordered table; the order, and who yields, are the only priority.
        force: allow this one only. It may still refuse.
        failed: (name, sentence) of backends that refused at run time (canary); they are not asked again.
    Raises:
        NoBackendError: all refused; carries every reason, also when `force` is not a name in the table.
    """
    already = dict(failed)
    refused: list[tuple[str, str]] = []
    check_forced(problem, backends, force)
    told = {} if force is not None else {b.name: b.yields(problem) for b in backends[:-1]}
    yielding = {name: said for name, said in told.items() if said is not None}
    first = [b for b in backends[:-1] if b.name not in yielding]
    backends = [*first, *(b for b in backends[:-1] if b.name in yielding), *backends[-1:]]
    for i, backend in enumerate(backends):
        if force is not None and backend.name != force:
            why: str | None = f"not the forced one ({force})"
        else:
            why = already.get(backend.name) or backend.refuse(problem)
        if why is None:
            behind = backends[i + 1 :]
            refused += [(b.name, b.refuse(problem) or yielding[b.name]) for b in behind if b.name in yielding]
            skipped = tuple(b.name for b in behind if b.name not in yielding)
            return Choice(problem, backend, tuple(refused), skipped)
        refused.append((backend.name, why))
    raise NoBackendError(problem, refused)
