"""`microscale explain`: which backend would run each layer, why each other one was refused, and how many bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microscale.errors import MicroscaleError

if TYPE_CHECKING:
    from microscale.machine import Machine
    from microscale.oracle import Backend
    from microscale.placed import Placed
    from microscale.plan import Outline, Plan

# What a generated token is where it is a chain of kernels, by the kind of device.
_CHAIN = {
    "cuda": "* in prompts; a generated token is one chain of kernels{replayed}: experts as above, "
    "and Triton's for norms, attention, routes, and products of few rows.",
    "cpu": "* in prompts; a generated token is one call of the C++ core for all layers: experts and linears as above, "
    "and its own embedding, norms, attention and routes.",
}
GRAPHS = {"cuda": "CUDA graph", "rocm": "HIP graph"}
HERE = "this"  # the word for the machine that this runs on


def explain(
    model: Annotated[
        str | None, typer.Argument(help="Directory, hub id, or bundled name; the bundled model if left out.")
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option(help="An invented machine, or `this`; repeat for several. `list` lists them."),
    ] = None,
    all_machines: Annotated[
        bool, typer.Option("--all-machines", help="This machine and all invented ones.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...: not the machine's first GPU.")] = None,
    packages: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="PACKAGE",
            help="As if this optional package were installed (humming, flashinfer, xpu_kernels, aiter, triton, or "
            "`all`); repeat for several.",
        ),
    ] = None,
    act: Annotated[
        str, typer.Option(help="How activations are stored: a16, a8, a6, a4, or a format.")
    ] = "a16",
    backend: Annotated[str | None, typer.Option(help="The only backend allowed.")] = None,
    layers: Annotated[int | None, typer.Option(help="Count the model's first layers only.")] = None,
    op: Annotated[str | None, typer.Option(help="Explain one layer, not a model: linear or moe.")] = None,
    format: Annotated[str | None, typer.Option(help="--op: format of its weights.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="--op linear: output features.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="--op: input features (moe: the hidden size).")] = None,
    experts: Annotated[int | None, typer.Option(help="--op moe: experts.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="--op moe: experts per token.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="--op moe: intermediate size.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say which backend runs each layer on a machine, and why the others do not. Needs no weights.

    Exit code 0; 1 where a layer has no backend (possible with --backend only).

    microscale explain gpt-oss-20b --machine h200 --machine zen5

    microscale explain gpt-oss-20b --machine b200 --with flashinfer --act a8
    """
    from microscale import env
    from microscale.backends import table
    from microscale.cli.output import emit, known, quiet_libraries
    from microscale.formats import FORMATS
    from microscale.models import BUNDLED
    from microscale.plan import outline, outline_shape

    shape = {"n": n, "k": k, "experts": experts, "top_k": top_k, "intermediate": intermediate}
    if machine and "list" in machine:
        asked = model or packages or all_machines or act != "a16" or backend or device or layers is not None
        if asked or machine != ["list"] or any(given is not None for given in (op, format, *shape.values())):
            raise MicroscaleError("`--machine list` lists the machines; with it only --json has a meaning")
        _list_machines(as_json)
        return
    added = _packages(packages or [])
    machines = [m.with_packages(added) for m in _machines(machine or [], all_machines)]
    backend = env.backend() if backend is None else backend
    if backend is not None:
        known(backend, [b.name for b in table()], "backend")
    check_act(act)
    if op is None:
        given = [
            f"--{key.replace('_', '-')}" for key, v in {"format": format, **shape}.items() if v is not None
        ]
        if given:
            raise MicroscaleError(f"{', '.join(given)} describes one layer: add --op linear or --op moe")
        quiet_libraries()
        what = outline(BUNDLED if model is None else model, act=act, layers=layers)
    else:
        if model is not None:
            raise MicroscaleError("give a model or --op, not both")
        if layers is not None:
            raise MicroscaleError("--layers cuts a model, and --op describes one layer")
        known(op, ("linear", "moe"), "op")
        needed = (
            ("format", "n", "k") if op == "linear" else ("format", "k", "experts", "top_k", "intermediate")
        )
        shape = {key: size for key, size in shape.items() if size is not None}
        _check_shape(op, needed, {**shape, **({"format": format} if format else {})})
        if op == "moe":
            shape.setdefault("n", shape["k"] or 0)
        sizes: dict[str, Any] = dict(shape)
        what = outline_shape(op, known(format or "", FORMATS, "format"), act=act, **sizes)
    plans = [what.on(m, device=device, backend=backend) for m in machines]
    if as_json:
        emit({**_outline_document(what), "machines": [_plan_document(p) for p in plans]})
    else:
        for i, plan in enumerate(plans):
            _show(plan, first=i == 0)
    if not all(p.runs for p in plans):
        raise typer.Exit(1)


def check_act(act: str) -> None:
    """Refuse a word for activations that is none.

    Raises:
        MicroscaleError: unknown; lists the known ones.
    """
    from microscale.cli.output import known
    from microscale.formats import FORMATS, FP8_GROUP128

    formats = [f.name for f in (*FORMATS.values(), FP8_GROUP128) if f.block[0] == 1]
    known(act, ("a16", "a8", "a6", "a4", *formats), "activation format")


def proven(backend: Backend, machine: Machine, device: str) -> bool:
    """Whether `backend.proven` names this kind of hardware: the GPU's model, or the CPU's family or level."""
    if device == "cpu":
        words = {"arm" if machine.level == "neon" else "x86", machine.level}
    else:
        gpus = [g for g in machine.gpus if g.kind == device]
        words = {w for g in gpus for w in re.findall(r"[a-z]*\d[a-z\d]*", g.name.lower())[:1]}
        words |= {g.arch for g in gpus if g.arch}
    return any(re.search(rf"\b{re.escape(w)}\b", backend.proven.lower()) for w in words)


def _machines(names: list[str], everything: bool) -> list[Machine]:
    from microscale.cli.output import known
    from microscale.invented import INVENTED
    from microscale.machine import lowered

    if everything:
        return [lowered(), *INVENTED.values()]
    for name in names:
        known(name, (HERE, *INVENTED), "machine")
    return [lowered() if name == HERE else INVENTED[name] for name in names or [HERE]]


def _packages(names: list[str]) -> list[str]:
    """The packages that `--with` names, by the backend that needs them or by their own name."""
    from microscale.cli.output import known
    from microscale.machine import PACKAGES, SHORT

    found: list[str] = []
    for name in names:
        known(name, ("all", *SHORT, *(p for p in PACKAGES if p not in SHORT)), "package")
        found += PACKAGES if name == "all" else [SHORT.get(name, name)]
    return list(dict.fromkeys(found))


def _check_shape(op: str, needed: tuple[str, ...], given: dict[str, Any]) -> None:
    missing = [f"--{key.replace('_', '-')}" for key in needed if key not in given]
    if missing:
        raise MicroscaleError(f"--op {op} needs {', '.join(missing)}")
    extra = [f"--{key.replace('_', '-')}" for key in given if key not in (*needed, "n")]
    if extra:
        raise MicroscaleError(f"--op {op} has no {', '.join(extra)}")


def describe(machine: Machine, device: str) -> str:
    """The part of a machine that matters for a device, in a line."""
    if device == "cpu":
        level, lowered = machine.level, machine.core_level
        level += f", the C++ core at {lowered}" if lowered != level else ""
        return f"{machine.cpu} ({level}, {machine.cores} cores, {_gib(machine.memory)})"
    gpus = [g for g in machine.gpus if g.kind == device]
    return "; ".join(f"{g.name} ({', '.join(filter(None, (g.arch, _gib(g.memory))))})" for g in gpus)


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"


def _list_machines(as_json: bool) -> None:
    from microscale.cli.output import emit, say
    from microscale.invented import INVENTED
    from microscale.machine import lowered

    machines = {HERE: lowered(), **INVENTED}
    if as_json:
        emit({name: machine_document(m) for name, m in machines.items()})
        return
    width = max(map(len, machines)) + 2
    for name, m in machines.items():
        say(f"{name:{width}}{describe(m, m.device)}", hang=width)


def machine_document(m: Machine) -> dict[str, Any]:
    """A machine for JSON."""
    return {
        "name": m.name,
        "cpu": m.cpu,
        "level": m.core_level,
        "cores": m.cores,
        "memory_bytes": m.memory,
        "gpus": [{"kind": g.kind, "arch": g.arch, "name": g.name, "memory_bytes": g.memory} for g in m.gpus],
        "packages": dict(m.packages),
        "assumed": sorted(m.assumed),
        "torch": m.torch,
    }


def _outline_document(what: Outline) -> dict[str, Any]:
    kv = what.kv
    return {
        "model": what.model,
        "stored_bytes": what.stored,
        "read_bytes_per_token": what.read,
        "kv_cache": {
            "bytes_per_token": kv.per_token,
            "bytes_per_token_beyond_window": kv.beyond,
            "window": kv.window,
        },
    }


def _plan_document(plan: Plan) -> dict[str, Any]:
    return {
        "machine": machine_document(plan.machine),
        "device": plan.device,
        "memory_bytes": plan.memory,
        "fits": plan.outline.stored <= plan.memory,
        "why_modules": plan.why_modules,
        "why_no_graph": plan.why_no_graph,
        "layers": [_placed_document(p, plan) for p in plan.placed],
    }


def _placed_document(p: Placed, plan: Plan) -> dict[str, Any]:
    from microscale.backends.dense_rules import HOST

    layer = p.layer
    document: dict[str, Any] = {
        "name": layer.name,
        "count": layer.count,
        "format": layer.format,
        "stored_bytes": layer.stored,
        "read_bytes_per_token": layer.read,
        "backend": p.backend,
        "token_backend": p.token_backend,
    }
    if p.problem is not None and layer.quantised:
        document |= {
            "problem": str(p.problem),
            "act": {"declared": layer.declared, "run": p.problem.act},
        }
    if p.problem is not None:
        document["refused"] = [{"backend": name, "reason": why} for name, why in p.refused]
    if layer.follows:
        document["follows"] = layer.follows
    elif p.choice is not None:
        backend = p.choice.backend
        document |= {
            "how": backend.how,
            "not_asked": list(p.choice.skipped),
        }
        if backend.name != HOST:
            document |= {
                "compared": p.choice.compared,
                "numerics": p.choice.numerics,
                "arithmetic": p.choice.arithmetic,
                "proven": {"on": backend.proven, "here": proven(backend, plan.machine, plan.device)},
            }
    return document


def _show(plan: Plan, first: bool) -> None:
    from microscale.cli.output import clean, grid, human, say, show

    what, machine = plan.outline, plan.machine
    if not first:
        say()
    say(f"{what.model} on {machine.name}: {describe(machine, plan.device)}", style="bold")
    if machine.assumed:
        say(f"as if installed: {', '.join(f'{p} {v}' for p, v in machine.packages if p in machine.assumed)}")
    columns = ("layers", "count", "format", "numerics", "backend", "stored", "per token")
    rows = grid(*columns, right=("count", "stored", "per token"), wrap=("layers", "numerics"))
    for p in plan.placed:
        layer = p.layer
        numerics = f"run {p.problem.act}" if p.problem is not None and layer.quantised else ""
        if layer.declared is not None:
            numerics = f"declared {layer.declared}, {numerics}"
        name, backend = clean(layer.name), p.backend or "none"
        if p.token_backend != p.backend:
            backend += " *"
        rows.add_row(
            name, str(layer.count), layer.format, numerics, backend, human(layer.stored), human(layer.read)
        )
    rows.add_row("total", "", "", "", "", human(what.stored), human(what.read))
    show(rows)
    _show_reasons(plan)
    if any(p.chained for p in plan.placed):
        say(_CHAIN[plan.device].format(replayed=_replayed(plan)), hang=0)
    elif plan.why_modules is not None:
        say(f"A generated token runs the model's modules{_replayed(plan)}: {plan.why_modules}.", hang=0)
    say(_memory_line(plan), hang=0)


def _replayed(plan: Plan) -> str:
    """What becomes of a generated token's steps, behind what they are; nothing where that says why already."""
    if plan.device == "cpu" or plan.why_no_graph == plan.why_modules is not None:
        return ""
    if plan.why_no_graph is not None:
        return f", not replayed from a {GRAPHS[plan.device]} ({plan.why_no_graph})"
    return f", replayed from a {GRAPHS[plan.device]}"


def _show_reasons(plan: Plan) -> None:
    """Once for all classes that got the same answer."""
    from microscale.backends.dense_rules import HOST
    from microscale.cli.output import say

    answers: dict[tuple[Any, ...], list[str]] = {}
    for p in plan.placed:
        if p.problem is not None:
            key = (
                None if p.choice is None else p.choice.backend,
                p.refused,
                p.choice.skipped if p.choice else (),
                (p.choice.numerics, p.choice.arithmetic) if p.choice else ("", ""),
                p.choice.compared if p.choice else None,
                p.token,
            )
            answers.setdefault(key, []).append(p.layer.name)
    for (backend, refused, skipped, (numerics, arithmetic), compared, token), names in answers.items():
        say(f"{', '.join(dict.fromkeys(names))}:")
        if backend is None:
            say("no backend: every one refused", indent=2)
        else:
            say(f"+ {backend.name}: {backend.how}", indent=2)
            if backend.name != HOST:
                for line in filter(None, (arithmetic, numerics)):
                    say(line, indent=4, hang=0)
                say(_proven_line(backend, plan), indent=4, hang=0)
                if compared is not None:
                    say(compared, indent=4, hang=0)
        if token not in (None, backend):
            say(f"+ {token.name}, for a generated token: {token.how}", indent=2)
            say(_proven_line(token, plan), indent=4, hang=0)
        for name, why in refused:
            say(f"- {name}: {why}", indent=2)
        if skipped:
            say(f"not asked, being behind it in the table: {', '.join(skipped)}", indent=2)
    for p in plan.placed:
        if p.layer.follows and p.backend != HOST:
            say(f"{p.layer.name}: where {p.layer.follows}s are, up to 8 rows; more rows are {HOST}'")


def _proven_line(backend: Backend, plan: Plan) -> str:
    if not backend.proven:
        return "never run by us on any hardware; its canary decides at load"
    if proven(backend, plan.machine, plan.device):
        return f"proven on this kind of hardware ({backend.proven})"
    return f"never run by us on this kind of hardware (only on: {backend.proven}); its canary decides at load"


def _memory_line(plan: Plan) -> str:
    from microscale.cli.output import human

    stored, kv = plan.outline.stored, plan.outline.kv
    verdict = "fit in" if stored <= plan.memory else "DO NOT FIT in"
    room = f"the {_gib(plan.memory)} ({human(plan.memory)}) of {plan.device} memory"
    line = f"The weights ({human(stored)}) {verdict} {room}."
    if kv.per_token:
        line += f" The key/value cache takes {human(kv.per_token)} for each token"
        if kv.window:
            line += f", and {human(kv.beyond)} once beyond the window of {kv.window}"
        line += "."
    return line
