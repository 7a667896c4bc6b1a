"""Placing a layer: choose a backend, pack the real weights, prove the choice on them, or take the next backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from microscale import env
from microscale.accumulation import FLOAT32, Accumulation
from microscale.backends import load, pack, table
from microscale.backends.contract import Contract
from microscale.backends.dense_rules import CORE, choose_dense
from microscale.errors import BackendError, NoBackendError, SettingError, one_line
from microscale.formats import Format, get_format
from microscale.machine import Machine, detect
from microscale.oracle import Backend, Choice, Problem, choose
from microscale.quant import QuantTensor
from microscale.tolerance import Budget, dense_budget, linear_budget, moe_budget

# One E8M0 or E4M3 NaN in the checked rows makes the expected value NaN too, and the comparison still holds.
_ROWS = 64  # of a linear's output that are compared, at each end
_TOKENS = 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items()}


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


@dataclass(frozen=True)
class Placement:
    """A layer that is ready to run.

    Attributes:
        choice: the backend and the reasons against the others, failed canaries among them.
        packed: what its `pack` made: one for a linear, w13 and w2 for MoE.
        proof: a sentence on the canary.
    """

    choice: Choice
    packed: tuple[Any, ...]
    proof: str

    @property
    def backend(self) -> Contract:
        """The chosen backend's module."""
        return load(self.choice.backend)

    @property
    def repacks(self) -> bool:
        """The packed form is a copy, and the canonical weights need not be kept beside it."""
        return bool(getattr(self.backend, "REPACKS", False))

    def unpack(self) -> tuple[QuantTensor, ...]:
        """The canonical weights; new memory where the backend repacks."""
        with torch.inference_mode(False), torch.no_grad():
            return tuple(self.backend.unpack(packed) for packed in self.packed)


@dataclass
class Placer:
    """Places the layers of one model, and remembers what it proved.

    Attributes:
        machine: whose facts the choices use.
        backends: the ordered table.
        force: the only backend allowed, if any.
        canary: "class" (each distinct problem once), "all" or "off".
    """

    machine: Machine = field(default_factory=detect)
    backends: Sequence[Backend] = field(default_factory=table)
    force: str | None = field(default_factory=env.backend)
    canary: str = field(default_factory=env.canary)
    _proven: dict[tuple[Problem, str], str] = field(default_factory=dict)
    _failed: dict[Problem, list[tuple[str, str]]] = field(default_factory=dict)

    def linear(self, problem: Problem, w: QuantTensor) -> Placement:
        """Place one linear layer whose weight is [N, K]."""
        return self._place(
            problem, (w,), lambda backend, packed, how: prove_linear(backend, packed[0], w, problem, how)
        )

    def moe(
        self,
        problem: Problem,
        w13: QuantTensor,
        w2: QuantTensor,
        b13: Tensor | None = None,
        b2: Tensor | None = None,
    ) -> Placement:
        """Place the experts of one layer: w13 [E, rows, H], w2 [E, H, I], biases [E, rows] and [E, H]."""

        def prove(backend: Contract, packed: tuple[Any, ...], how: Accumulation) -> str:
            return prove_moe(backend, packed, (w13, w2), (b13, b2), problem, how)

        return self._place(problem, (w13, w2), prove)

    def refuses_dense(self, problem: Problem) -> bool:
        """Whether a linear whose weight is not quantised is its host's by rule or by wish."""
        return choose_dense(problem, self.force).backend is not CORE

    def dense(self, problem: Problem, w: Tensor, bias: Tensor | None) -> Placement:
        """Place one linear layer whose weight [N, K] is not quantised, and stays where it is."""

        def choose_here(failed: list[tuple[str, str]]) -> Choice:
            return choose_dense(problem, self.force, failed)

        def prove(backend: Contract, _packed: tuple[Any, ...], _how: Accumulation) -> str:
            return prove_dense(backend, w, bias, problem)

        failed = self._failed.setdefault(problem, [])
        with torch.no_grad():
            return self._first_that_works(problem, (), prove, failed, choose_here)

    def _place(
        self,
        problem: Problem,
        weights: tuple[QuantTensor, ...],
        prove: Callable[[Contract, tuple[Any, ...], Accumulation], str],
    ) -> Placement:
        failed = self._failed.setdefault(problem, [])
        with torch.no_grad():
            return self._first_that_works(
                problem,
                weights,
                prove,
                failed,
                lambda failed: choose(problem, self.backends, self.force, failed),
            )

    def _first_that_works(
        self,
        problem: Problem,
        weights: tuple[QuantTensor, ...],
        prove: Callable[[Contract, tuple[Any, ...], Accumulation], str],
        failed: list[tuple[str, str]],
        choose_here: Callable[[list[tuple[str, str]]], Choice],
    ) -> Placement:
        while True:
            choice = choose_here(failed)
            name = choice.backend.name
            try:
                backend = load(choice.backend)
                packed = tuple(pack(backend, w, _act(problem)) for w in weights)
                proof = self._proven.get((problem, name))
                if self.canary == "off":
                    proof = "not proved: the canary is off"
                elif proof is None or self.canary == "all":
                    how = choice.backend.accumulation(problem)
                    proof = self._proven[problem, name] = prove(backend, packed, how)
            except Exception as error:  # noqa: BLE001 (whatever a backend raises, the next one still gets its turn)
                failed.append((name, _sentence(error)))
                continue
            return Placement(choice, packed, proof)


class CanaryFailure(Exception):
    """The chosen backend computed something else than the reference."""


def prove_linear(
    backend: Contract,
    packed: Any,
    w: QuantTensor,
    problem: Problem,
    accumulation: Accumulation = FLOAT32,
) -> str:
    """Run the packed layer on random tokens and compare its first and last rows with float64.

    Raises:
        CanaryFailure: outside the kernel error budget; says by how much.
    """
    act = _act(problem)
    x = _tokens(w.shape[-1], problem, w.device)
    y = backend.linear(x, packed, act=act)
    n, height = w.shape[-2], w.format.block[0]
    count = max(_ROWS // height, 1) * height
    worst = 0.0
    for start in sorted({0, max(n - count, 0) // height * height}):
        stop = min(start + count, n)
        budget = linear_budget(x, w.rows(start, stop), act=act, accumulation=accumulation)
        worst = max(worst, budget.worst(y[:, start:stop]))
    return _verdict(worst)


def prove_dense(backend: Any, w: Tensor, bias: Tensor | None, problem: Problem) -> str:
    """Multiply the weight's first and last rows by random tokens and compare with float64; reads no others.

    Raises:
        CanaryFailure: outside the kernel error budget; says by how much.
    """
    if problem.device != "cpu" or not hasattr(backend, "dense"):
        return "not proved: it is the host's own"
    x = _tokens(w.shape[-1], problem, w.device)
    worst = 0.0
    for start in sorted({0, max(w.shape[0] - _ROWS, 0)}):
        part = slice(start, start + _ROWS)
        rows, b = w[part], None if bias is None else bias[part]
        worst = max(worst, dense_budget(x, rows, b).worst(backend.dense(x, rows, b)))
    return _verdict(worst)


def prove_moe(
    backend: Contract,
    packed: tuple[Any, ...],
    weights: tuple[QuantTensor, QuantTensor],
    biases: tuple[Tensor | None, Tensor | None],
    problem: Problem,
    accumulation: Accumulation = FLOAT32,
) -> str:
    """Send one random token to the first expert and one to the last, and compare with float64.

    Raises:
        CanaryFailure: outside the kernel error budget; says by how much.
    """
    assert problem.activation is not None
    act = _act(problem)
    x = _tokens(problem.k, problem, weights[0].device)
    ids = torch.full((_TOKENS, max(problem.top_k, 1)), -1, dtype=torch.int64, device=x.device)
    ids[:, 0] = torch.tensor([0, weights[0].shape[0] - 1], device=x.device)
    routing = torch.full(ids.shape, 0.75, dtype=torch.float32, device=x.device)
    options: dict[str, Any] = {"b13": biases[0], "b2": biases[1], "act": act}
    w13, w2 = packed
    y = backend.moe(x, ids, routing, w13, w2, problem.activation, **options)
    options["accumulation"] = accumulation
    budget: Budget = moe_budget(x, ids, routing, *weights, problem.activation, **options)
    return _verdict(budget.worst(y))


def _tokens(k: int, problem: Problem, device: torch.device) -> Tensor:
    # The same tokens every time: a canary that fails once fails again. Made on the CPU, equal on every device.
    generator = torch.Generator("cpu").manual_seed(20)
    return torch.randn(_TOKENS, k, generator=generator, device="cpu").to(
        device=device, dtype=DTYPES[problem.dtype]
    )


def _act(problem: Problem) -> Format | None:
    return None if problem.act == "a16" else get_format(problem.act)


def _verdict(worst: float) -> str:
    if not worst <= 1.0:
        raise CanaryFailure(f"the canary failed: its error is {worst:.3g} times the permitted one")
    return f"canary passed at {worst:.2f} of the permitted error"


def _sentence(error: Exception) -> str:
    if isinstance(error, CanaryFailure):
        return str(error)
    if isinstance(error, (NoBackendError, SettingError)):
        raise error
    return f"it failed while the layer was placed: {type(error).__name__}: {one_line(error)}"
