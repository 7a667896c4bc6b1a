"""`microscale doctor`: what this machine offers, what each backend lacks, and what to install."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microscale.errors import MicroscaleError

if TYPE_CHECKING:
    from microscale.machine import Machine
    from microscale.oracle import Backend, Problem

_UNRELATED = ("add_vectors.py", "rotary_embedding.py")  # files of PyPI's triton_kernels, not of OpenAI's


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False) -> None:
    """Say what was detected on this machine, what each backend lacks, and what to install. Always exits with 0."""
    from microscale import __version__
    from microscale.backends import table
    from microscale.cli.explain import machine_document
    from microscale.cli.output import emit
    from microscale.machine import PACKAGES, detect

    machine = detect()
    document = {
        "microscale": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": machine_document(machine),
        "amx": amx(machine),
        "core": core(machine),
        "compiler": machine.compiler or None,
        "requirements": requirements(),
        "packages": [_package(name, machine) for name in PACKAGES],
        "backends": [_backend(b, d, machine) for d in _devices(machine) for b in table()],
        "environment": environment(),
        "warnings": warnings(machine),
    }
    if as_json:
        emit(document)
    else:
        _show(document, machine)


def amx(machine: Machine) -> str:
    """Whether AMX tiles can be used, and if not, at what it fails."""
    if "amx_tile" not in machine.isa:
        return "not in this CPU, or hidden by the virtual machine"
    if not machine.amx_permitted:
        return "in this CPU, but the system refuses it to this process (Linux before 5.16, or a sandbox forbids it)"
    return "usable"


def core(machine: Machine) -> str:
    """Whether the C++ core, which the backend `cpu` is, can be used, up to which level, and if not, why."""
    if not machine.core:
        return f"the C++ core is not in this installation: {machine.core_missing}"
    return f"compiled for levels up to {machine.core}; this machine's is {machine.level}"


def requirements() -> list[dict[str, Any]]:
    """What microscale requires, and whether the installed versions satisfy it."""
    from packaging.requirements import Requirement

    found = []
    try:
        lines = importlib.metadata.requires("microscale") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        lines = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        satisfied = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        found.append(
            {
                "name": requirement.name,
                "required": str(requirement.specifier),
                "installed": installed,
                "satisfied": satisfied,
            }
        )
    return found


def environment() -> dict[str, dict[str, Any]]:
    """Variable -> what it means, and the value in effect, set or default (None: no value, or one that is invalid)."""
    from microscale import env

    readers: dict[str, Callable[[], Any]] = {
        "MICROSCALE_BACKEND": _forced,
        "MICROSCALE_CANARY": env.canary,
        "MICROSCALE_CPU_LEVEL": _lowered,
        "MICROSCALE_DENSE": env.dense,
        "MICROSCALE_EMULATION_TILE": env.emulation_tile,
        "MICROSCALE_EMULATION_CACHE": env.emulation_cache,
        "MICROSCALE_TRANSFORMERS": env.transformers_hook,
    }
    found = {}
    for name, meaning in env.VARIABLES.items():
        value = error = None
        try:
            value = readers[name]() if name in readers else None
        except MicroscaleError as e:
            error = str(e)
        found[name] = {"meaning": meaning, "value": value, "error": error}
    return found


def _forced() -> str | None:
    """MICROSCALE_BACKEND, if there is such a backend."""
    from microscale import env
    from microscale.backends import table
    from microscale.cli.output import known

    word = env.backend()
    return word and known(word, [b.name for b in table()], "backend of MICROSCALE_BACKEND")


def _lowered() -> str | None:
    """MICROSCALE_CPU_LEVEL, if the core here has it."""
    from microscale import env
    from microscale.machine import lowered

    word = env.cpu_level()
    lowered()
    return word


def warnings(machine: Machine) -> list[str]:
    """Traps that this machine is in."""
    import torch

    from microscale.backends.triton_rules import uncompiled, unproven

    found = []
    for lost in (unproven, uncompiled):
        if (why := lost(machine)) is not None:
            found.append(why)
    if _unrelated_triton_kernels():
        found.append(
            "the installed package triton_kernels is an unrelated one of that name on PyPI, not OpenAI's kernels: "
            "uninstall it (pip uninstall triton_kernels); microscale needs neither"
        )
    if _unrelated_aiter():
        found.append(
            "the installed package aiter is an unrelated one of that name on PyPI, in the place of AMD's: "
            "uninstall it (pip uninstall aiter); AMD's is amd-aiter"
        )
    for tool, vendor, built in (
        ("nvidia-smi", "an NVIDIA", torch.version.cuda),
        ("rocm-smi", "an AMD", torch.version.hip),
    ):
        if shutil.which(tool) and not machine.gpus:
            why = (
                f"torch {torch.__version__} sees no GPU"
                if built
                else f"torch {torch.__version__} is built without it"
            )
            found.append(
                f"{tool} is here, so there may be {vendor} GPU, but {why}: see https://pytorch.org/get-started"
            )
    if torch.get_num_threads() > machine.cores:
        threads, cores = torch.get_num_threads(), machine.cores
        found.append(f"torch uses {threads} threads on {cores} permitted cores: set OMP_NUM_THREADS={cores}")
    if "amx_tile" in machine.isa and not machine.amx_permitted:
        found.append(f"AMX is {amx(machine)}")
    found += [v["error"] for v in environment().values() if v["error"]]
    for r in requirements():
        if not r["satisfied"]:
            found.append(
                f"{r['name']}{r['required']} is required, {r['installed'] or 'nothing'} is installed"
            )
    return found


def _devices(machine: Machine) -> list[str]:
    return list(dict.fromkeys([*(g.kind for g in machine.gpus), "cpu"]))


def _package(name: str, machine: Machine) -> dict[str, Any]:
    """An optional package, and what would change if it were installed: the backends are asked."""
    from microscale.backends import table
    from microscale.backends.adapters.common_rules import missing

    installed = dict(machine.packages).get(name)
    gains: dict[str, int] = {}
    why: str | None = None
    if installed is None:
        for device in _devices(machine):
            problems = [p.on(machine, device) for p in _matrix()]
            for b in table():
                refused = [p for p in problems if b.refuse(p) is not None]
                gain = sum(b.refuse(as_if(p, name)) is None for p in refused)
                if gain:
                    gains[f"{b.name} on {device}"] = gain
    elif name != "triton":
        why = missing(_matrix()[0].on(machine), name)
    return {"name": name, "installed": installed, "refused": why, "would_add": gains}


def as_if(problem: Problem, package: str) -> Problem:
    """The same problem with an optional package installed, in the version that was read."""
    from microscale.machine import READ

    versions = problem.versions | {(package, READ[package])}
    return replace(problem, packages=problem.packages | {package}, versions=versions)


def _backend(backend: Backend, device: str, machine: Machine) -> dict[str, Any]:
    """How much of the matrix a backend runs on a device, and the commonest reason against the rest."""
    problems = [p.on(machine, device) for p in _matrix()]
    refusals = Counter(why for p in problems if (why := backend.refuse(p)) is not None)
    return {
        "name": backend.name,
        "device": device,
        "how": backend.how,
        "proven": backend.proven,
        "asked": len(problems),
        "runs": len(problems) - refusals.total(),
        "refusals": [{"reason": why, "count": n} for why, n in refusals.most_common()],
    }


def _matrix() -> list[Problem]:
    """One large layer of each op, format and width of activations."""
    from microscale.activations import Activation
    from microscale.formats import FORMATS, activation_format
    from microscale.oracle import Problem

    problems = []
    for fmt in FORMATS:
        acts = {"a16"} | {f.name for a in ("a8", "a6", "a4") if (f := activation_format(fmt, a)) is not None}
        for act in sorted(acts):
            linear = Problem("linear", fmt, 4096, 4096, act)
            moe = replace(
                linear, op="moe", intermediate=2048, experts=32, top_k=4, activation=Activation("silu")
            )
            problems += [linear, moe]
    return problems


def _unrelated_triton_kernels() -> bool:
    try:
        files = importlib.metadata.files("triton_kernels") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(file.name in _UNRELATED for file in files)


def _unrelated_aiter() -> bool:
    """PyPI's aiter has tools for asynchronous iterators; AMD's has a folder `ops`."""
    try:
        files = importlib.metadata.files("aiter") or []
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(files) and not any("ops" in file.parts for file in files)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(d: dict[str, Any], machine: Machine) -> None:
    import torch

    from microscale.cli.explain import describe
    from microscale.cli.output import say

    width = max(len("transformers"), *(len(r["name"]) for r in d["requirements"])) + 2

    def line(name: str, text: str) -> None:
        say(f"{name:{width}}{text}", hang=width)

    line("microscale", f"{d['microscale']}, Python {d['python']} ({sys.executable}), {d['platform']}")
    line("CPU", describe(machine, "cpu"))
    line("AMX", d["amx"])
    line("C++ core", d["core"])
    for kind in _devices(machine)[:-1]:
        line("GPU", f"{kind}: {describe(machine, kind)}")
    if not machine.gpus:
        line("GPU", "none that torch sees")
    line("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    line("compiler", d["compiler"] or "none; compiling the C++ core, and kernels at run time, needs one")
    for r in d["requirements"]:
        if r["name"] != "torch":
            line(
                r["name"],
                f"{r['installed'] or 'missing'} ({r['required']} {'satisfied' if r['satisfied'] else 'NOT SATISFIED'})",
            )

    say()
    say("Optional packages", style="bold")
    for p in d["packages"]:
        gains = ", ".join(f"{who} runs {n} combinations more" for who, n in p["would_add"].items())
        advice = f"pip install {p['name']}: {gains}" if gains else "no backend would use it on this machine"
        there = f"{p['installed']}; not used: {p['refused']}" if p["refused"] else p["installed"]
        say(f"{p['name']:19}{there or f'not installed; {advice}'}", hang=19)
    say()
    say("Backends, in the order they are asked", style="bold")
    for b in d["backends"]:
        runs = "all" if b["runs"] == b["asked"] else b["runs"] or "none"
        text = f"{b['name']} on {b['device']}: runs {runs} of {b['asked']} combinations of op, format and activations"
        if b["refusals"]:
            text += (
                f"; mostly because {b['refusals'][0]['reason']}"
                if b["runs"]
                else f"; {b['refusals'][0]['reason']}"
            )
        say(text)

    say()
    say("Environment variables", style="bold")
    for name, v in d["environment"].items():
        value = "on" if v["value"] is True else v["value"]
        unset = "not set" if v["error"] is None else "invalid"
        say(f"{name}: {unset if value is None else value} ({v['meaning']})")

    for text in d["warnings"]:
        say()
        say(f"WARNING: {text}", style="bold yellow", hang=0)
