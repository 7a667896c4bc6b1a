"""What a model becomes on a machine, without its weights: the backend of each of its layer classes, and bytes.

An `Outline` is a model's layers, grouped; it knows no machine. `Outline.on` asks the oracle what `load` would ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from microscale.activations import Activation
from microscale.backends import table
from microscale.errors import FormatError, MicroscaleError, brief
from microscale.formats import activation_format, activation_word, get_format
from microscale.kv_cache import KvCache, kv_cache
from microscale.layer_classes import LayerClass, Packed, classes_of
from microscale.machine import Machine
from microscale.oracle import Backend, Problem
from microscale.placed import Placed, Unchained, chain, place

_MAX_SIZE = 2**31  # of a dimension of a bare shape
_BF16 = 2  # bytes


@dataclass(frozen=True)
class Plan:
    """What `load` would do with a model on a machine.

    Attributes:
        device: kind of device on that machine, "cpu", "cuda" ...
        why_modules: of CPUs, and of GPUs with CUDA graphs: why a generated token is not a chain of kernels. None: it
            is, or there are none for such a device, or no model.
    """

    outline: Outline
    machine: Machine
    device: str
    placed: tuple[Placed, ...]
    why_modules: str | None = None

    @property
    def memory(self) -> int:
        """Bytes of the device's memory."""
        return next((g.memory for g in self.machine.gpus if g.kind == self.device), self.machine.memory)

    @property
    def why_no_graph(self) -> str | None:
        """Of CUDA and ROCm: why a generated token is not replayed from a CUDA graph. None: it is, or no model."""
        if not self.outline.steps or self.device not in ("cuda", "rocm"):
            return None
        waiting = [
            p.choice.backend.name
            for p in self.placed
            if p.choice is not None and p.choice.problem.op == "moe" and p.choice.backend.waits
        ]
        by_experts = f"{waiting[0]} waits for the GPU to know which experts have rows" if waiting else None
        return self.outline.unchained.replay or by_experts

    @property
    def runs(self) -> bool:
        """Every quantised class has a backend."""
        return all(p.backend is not None for p in self.placed)


@dataclass(frozen=True)
class Outline:
    """A model's layers, grouped, on no machine.

    Attributes:
        model: its name, for people.
        classes: experts first, then by the order of the forward pass.
        kv: bytes of the key/value cache.
        steps: it generates tokens; a bare layer does not.
        unchained: what of it chains of kernels do not know, which a generated token is else on CUDA and on CPUs.
    """

    model: str
    classes: tuple[LayerClass, ...]
    kv: KvCache = field(default_factory=KvCache)
    steps: bool = False
    unchained: Unchained = field(default_factory=Unchained)

    @property
    def stored(self) -> int:
        """Bytes of all weights in memory."""
        return sum(c.stored for c in self.classes)

    @property
    def read(self) -> int:
        """Bytes of weights that one decoded token reads; the key/value cache comes on top."""
        return sum(c.read for c in self.classes)

    def on(
        self,
        machine: Machine,
        *,
        device: str | None = None,
        backend: str | None = None,
        backends: Sequence[Backend] | None = None,
    ) -> Plan:
        """Ask the oracle for every class.

        Args:
            device: kind; by default the machine's first GPU, else the CPU.
            backend: the only one allowed.
            backends: the ordered table; by default `backends.table()`.
        Raises:
            MicroscaleError: the machine has no such device.
        """
        device = machine.device if device is None else device
        kinds = list(dict.fromkeys(["cpu", *(g.kind for g in machine.gpus)]))
        if device not in kinds:
            raise MicroscaleError(f"{machine.name} has no device {brief(device)}; it has {', '.join(kinds)}")
        backends = table() if backends is None else backends
        placed: Sequence[Placed] = [place(c, machine, device, backend, backends) for c in self.classes]
        choices = {p.layer.name: p.choice for p in placed}
        placed, why = [replace(p, choice=choices.get(p.layer.follows, p.choice)) for p in placed], None
        if self.steps:
            placed, why = chain(placed, machine, device, self.unchained)
        return Plan(self, machine, device, tuple(placed), why)


def plan(
    model: str | Path,
    machine: Machine,
    *,
    act: str = "a16",
    backend: str | None = None,
    layers: int | None = None,
    device: str | None = None,
) -> Plan:
    """What `load(model, act=act, backend=backend)` would do on a machine; see `outline`."""
    return outline(model, act=act, layers=layers).on(machine, device=device, backend=backend)


def outline(model: str | Path, *, act: str = "a16", layers: int | None = None) -> Outline:
    """A model's layer classes, from its config and, where there are weights, their headers. Imports transformers.

    Args:
        model: as in `load`.
        act: how activations are to be stored before each product.
        layers: count the first ones only.
    Raises:
        CheckpointError: no such model, or one that cannot be read.
        FormatError: unknown `act`.
    """
    from microscale.checkpoints import dialect_of, open_checkpoint, read_config
    from microscale.integrations.hf.attention import fuse_sinks
    from microscale.integrations.hf.chain_parts import refuse_parts
    from microscale.integrations.hf.cpu_models import refuse_modules
    from microscale.integrations.hf.dummy import dummy_config, meta_model
    from microscale.integrations.hf.graph import refuse_model
    from microscale.integrations.hf.options import Options, using
    from microscale.integrations.hf.quantizer import attach_all
    from microscale.models import config_alone, resolve

    path = resolve(model, weights=False)
    checkpoint = None if config_alone(path) else open_checkpoint(path)
    config = read_config(path)
    if checkpoint is None:
        dialect_of(config, path)
    host = meta_model(dummy_config(path, config, layers), path)
    if config.get("quantization_config") is not None:
        with using(Options(act=act, canary="off", place=False)):
            attach_all(host)
    packed: Packed = {}
    if checkpoint is not None:
        size = checkpoint.source.info
        entries = (e for e in checkpoint.groups if e.format is not None)
        packed = {
            (e.module, e.role): (str(e.format), sum(size(t).nbytes for t in e.tensors)) for e in entries
        }
    classes, kv = classes_of(host, packed, act), kv_cache(host.config.get_text_config())
    fuse_sinks(host.eval())  # as a loaded one
    unchained = Unchained(refuse_model(host), refuse_parts(host), refuse_modules(host))
    return Outline(Path(model).name, classes, kv, True, unchained)


def plan_shape(
    op: str, format: str, n: int, k: int, machine: Machine, *, backend: str | None = None, **shape: Any
) -> Plan:
    """The plan of one layer of a given shape; `shape` goes to `outline_shape`."""
    return outline_shape(op, format, n, k, **shape).on(machine, backend=backend)


def outline_shape(
    op: str,
    format: str,
    n: int,
    k: int,
    *,
    act: str = "a16",
    experts: int = 0,
    top_k: int = 0,
    intermediate: int = 0,
    activation: Activation | None = None,
    bias: bool = False,
) -> Outline:
    """One layer of a given shape, with bf16 activations.

    Args:
        op: "linear" [n, k], or "moe" of `experts` with hidden size n = k and `intermediate` between.
        activation: of a MoE; plain SwiGLU by default.
    Raises:
        FormatError: unknown names, or a shape that is none.
    """
    fmt, act_format = get_format(format), activation_format(format, act)
    if op not in ("linear", "moe"):
        raise FormatError(f"unknown op {op!r}; known: linear, moe")
    sizes = {"experts": experts, "top_k": top_k, "intermediate": intermediate} if op == "moe" else {}
    for name, size in {"k": k, "n": n, **sizes}.items():  # of a MoE, n is what k is
        if not 1 <= size <= _MAX_SIZE:
            raise FormatError(f"{op} needs {name} from 1 to {_MAX_SIZE}, not {size}")
    problem = Problem(op, fmt.name, n, k, activation_word(act_format), bias=bias)
    stored = read = stored_bytes(fmt.name, (n, k)) + bias * n * _BF16
    if op == "moe":
        if n != k:
            raise FormatError(f"moe maps the hidden size to itself: n and k must be equal, not {n} and {k}")
        if top_k > experts:
            raise FormatError(f"top_k {top_k} is more than the {experts} experts")
        activation = activation or Activation("silu")
        problem = replace(problem, activation=activation, experts=experts, top_k=top_k)
        problem = replace(problem, intermediate=intermediate)
        rows = activation.rows(intermediate)
        one = stored_bytes(fmt.name, (rows, k)) + stored_bytes(fmt.name, (k, intermediate))
        one += bias * (rows + k) * _BF16
        stored, read = experts * one, top_k * one
    layer = LayerClass(op, 1, fmt.name, stored, read, problem)
    return Outline(str(problem).partition(" on ")[0], (layer,))


def stored_bytes(format: str, shape: tuple[int, ...]) -> int:
    """Bytes of codes, scales and one tensor scale per matrix, of a [..., N, K] weight."""
    fmt = get_format(format)
    *lead, n, k = shape
    matrix = n * fmt.packed_columns(k) + fmt.scale_bytes * prod(fmt.scale_shape(n, k)) + 4 * fmt.tensor_scale
    return prod(lead) * matrix
