"""A model's layers, grouped by what the oracle would be asked of them: from modules without memory behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from microscale.backends.dense_rules import WEIGHTS
from microscale.canary import DTYPE_WORDS, dtype_word
from microscale.dense import dense_problem
from microscale.formats import activation_format, activation_word
from microscale.machine import Machine
from microscale.nn import runner_of
from microscale.oracle import Problem

Packed = dict[tuple[str, str], tuple[str, int]]  # (module, role) -> format and bytes of a quantised tensor
# Path components of linears that choose experts: tiny, and an error there changes which expert runs.
ROUTER_NAMES = frozenset({"router", "gate", "shared_expert_gate"})
CORE_NORMS, SINKS, OTHERS = "norms", "attention sinks", "norms etc."
_NOWHERE = Machine("nowhere", "", frozenset(), False, 0, 0)


@dataclass(frozen=True)
class LayerClass:
    """Layers of one model that are the same to the oracle.

    Attributes:
        name: "experts", "attention q/k/v/o", "router", "lm_head", "embedding" ...
        count: modules.
        format: of the weights: a block-scaled format, or a dtype word ("bf16").
        stored: bytes that all of them take in memory, biases included.
        read: bytes of them that one decoded token reads: of experts those it is routed to, of an embedding one row.
        problem: what the oracle is asked, on no machine yet; of several shapes, the first one's. None: nothing is to
            be chosen, transformers runs it.
        declared: how the checkpoint says activations are stored; None: not quantised, or no checkpoint.
        follows: name of the linears that these run with, where nothing is to be chosen: gpt-oss' norms go to the C++
            core where its routers do.
    """

    name: str
    count: int
    format: str
    stored: int
    read: int
    problem: Problem | None = None
    declared: str | None = None
    follows: str = ""

    @property
    def quantised(self) -> bool:
        """The weights are in a block-scaled format."""
        return self.problem is not None and self.problem.weight not in WEIGHTS


def classes_of(host: Any, packed: Packed, act: str) -> tuple[LayerClass, ...]:
    """Group the modules of a meta model; `packed`: what of it the checkpoint's files hold quantised."""
    groups: dict[tuple[str, str, Problem | None], list[Any]] = {}
    seen: set[int] = set()
    for path, module in host.named_modules():
        own = list(module.named_parameters(recurse=False))
        transient = module._non_persistent_buffers_set
        own += [(n, b) for n, b in module.named_buffers(recurse=False) if n not in transient]
        if not own:
            continue
        kind, leaf = _kind(path, module, host)
        fmt, problem, weight = _format_of(path, module, host, packed, act)
        total = weight + sum(t.nbytes for name, t in own if not (weight and name == "weight"))
        tied = all(id(t) in seen for _, t in own)
        seen.update(id(t) for _, t in own)
        key = problem
        if problem is not None and problem.weight in WEIGHTS:
            # No choice depends on these, but on whether rows are whole lines of 16 bytes.
            key = replace(problem, n=0, k=problem.k % 8, bias=False)
        group = groups.setdefault((kind, fmt, key), [{}, 0, 0, 0, problem])
        group[0][leaf] = None
        group[1] += 1
        group[2] += 0 if tied else total
        group[3] += _read(kind, module, total, problem, host)
        if tied:
            group[0] = {"(tied)": None}
    classes = []
    for (kind, fmt, _), (leaves, count, stored, read, problem) in groups.items():
        name = " ".join(filter(None, (kind, "/".join(filter(None, leaves)))))
        # The only dialect that has formats, gpt_oss, quantises weights alone.
        declared = None if problem is None or problem.weight in WEIGHTS else "a16"
        follows = "router" if name == CORE_NORMS else ""
        classes.append(LayerClass(name, count, fmt, stored, read, problem, declared, follows))
    # Stable: experts, then the order of the forward pass, then what is in no product.
    last = (CORE_NORMS, SINKS, OTHERS)
    return tuple(sorted(classes, key=lambda c: (not c.name.startswith("experts"), c.name in last)))


def kind_of(path: str, matrix: bool) -> tuple[str, str]:
    """(class, leaf) of a module by its path: ("attention", "q"). `matrix`: it holds more than vectors."""
    parts = path.split(".")
    leaf = parts[-1].removesuffix("_proj")
    if "experts" in parts:
        return "experts", "" if leaf == "experts" else leaf
    if parts[-1] in ROUTER_NAMES:
        return "router", ""
    if not matrix:
        return OTHERS, ""
    if any(part.startswith("shared_expert") for part in parts):
        return "shared experts", leaf
    if any("attn" in part or "attention" in part for part in parts):
        return "attention", leaf
    return ("mlp" if "mlp" in parts else "linear"), leaf


def _kind(path: str, module: nn.Module, host: Any) -> tuple[str, str]:
    if module is host.get_output_embeddings():
        return "lm_head", ""
    if isinstance(module, nn.Embedding):
        return "embedding", ""
    if type(module).__name__ == "GptOssRMSNorm":  # not imported to ask; see `integrations.hf.gpt_oss`
        return CORE_NORMS, ""
    if hasattr(module, "sinks"):
        return SINKS, ""
    return kind_of(path, any(p.dim() > 1 for p in module.parameters(recurse=False)))


def _format_of(
    path: str, module: Any, host: Any, packed: Packed, act: str
) -> tuple[str, Problem | None, int]:
    """(format or dtype word, problem, bytes of the packed weight where they are not the module's own)."""
    runner = runner_of(module)
    if runner is not None:
        # The very question that loading asks, but for the machine.
        return runner.format.name, runner.problem(host.dtype, _NOWHERE).on(_NOWHERE), 0
    if (path, "weight") in packed:
        fmt, nbytes = packed[path, "weight"]
        n, k = module.weight.shape
        run = activation_word(activation_format(fmt, act))
        bias = getattr(module, "bias", None) is not None
        return fmt, Problem("linear", fmt, n, k, run, dtype_word(host.dtype), bias=bias), nbytes
    from microscale.integrations.hf.linears import dense_class

    if dense_class(module) is not None:
        asked = dense_problem(module, host.dtype, _NOWHERE).on(_NOWHERE)
        return asked.weight, asked, 0
    dtype = next(p.dtype for p in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    return DTYPE_WORDS.get(dtype, str(dtype).removeprefix("torch.")), None, 0


def _read(kind: str, module: Any, total: int, problem: Problem | None, host: Any) -> int:
    """Bytes that one token reads of a module that takes `total`."""
    if kind == "embedding":
        return int(module.weight.nbytes // max(module.weight.shape[0], 1))
    if kind != "experts":
        return total
    from microscale.integrations.hf.quantizer import top_k_of

    top_k = problem.top_k if problem else top_k_of(host.config)
    experts = problem.experts if problem else int(next(module.parameters(recurse=False)).shape[0])
    return total * min(top_k, experts) // max(experts, 1)
