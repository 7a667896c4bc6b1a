"""`microscale selftest`: the conformance suite, on the user's own machine."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microscale.cli.output import SEED
from microscale.errors import one_line

if TYPE_CHECKING:
    from microscale.conformance import Case
    from microscale.machine import Machine
    from microscale.oracle import Backend

_TORCH_DEVICE = {"rocm": "cuda"}


@dataclass(frozen=True)
class Outcome:
    """One case on one backend.

    Attributes:
        skipped: the backend's sentence, if it refused.
        worst: largest error as a fraction of the permitted one.
        failed: what went wrong, if anything did.
    """

    backend: str
    device: str
    case: Case
    skipped: str | None = None
    worst: float = 0.0
    failed: str | None = None


def selftest(
    backend: Annotated[
        list[str] | None, typer.Option(help="Test this backend only; may be repeated.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda ...; all that are here if left out.")
    ] = None,
    large: Annotated[
        bool, typer.Option("--large", help="Also a real model's shape for each format.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(**SEED, help="Of the random weights; a new one each time if left out.")
    ] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check every backend that runs on this machine against float64, on every format, shape and option.

    Exit code 0; 1 if a case failed, or none ran.
    """
    from microscale import conformance
    from microscale.backends import table
    from microscale.cli.output import emit, known, progress
    from microscale.machine import detect

    machine = detect()
    for name in backend or ():
        known(name, [b.name for b in table()], "backend")
    kinds = list(dict.fromkeys([*(g.kind for g in machine.gpus), "cpu"]))
    for name in device or ():
        known(name, kinds, "device")
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    chosen = [b for b in table() if not backend or b.name in backend]
    work = [(b, d, case) for b in chosen for d in device or kinds for case in conformance.cases(large)]

    outcomes = []
    for b, d, case in progress(work, "selftest"):
        why = b.refuse(case.problem(machine, d))
        outcomes.append(
            Outcome(b.name, d, case, skipped=why) if why is not None else _run(b, d, case, seed, machine)
        )
        if outcomes[-1].failed and fail_fast:
            break
    failed = [o for o in outcomes if o.failed]
    ran = sum(o.skipped is None for o in outcomes)
    if as_json:
        emit(_document(outcomes, seed))
    else:
        _show(outcomes, seed, stopped=len(outcomes) < len(work))
    if failed or not ran:
        raise typer.Exit(1)


def _run(backend: Backend, device: str, case: Case, seed: int, machine: Machine) -> Outcome:
    import torch

    from microscale.backends import load
    from microscale.conformance import run

    # A generator of its own for each case: one that failed fails again when it is run alone.
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            how = backend.accumulation(case.problem(machine, device))
            worst = run(case, load(backend), _TORCH_DEVICE.get(device, device), generator, how)
    except Exception as error:  # noqa: BLE001 (whatever a backend raises is the finding)
        failure = f"{type(error).__name__}: {one_line(error)}"
        return Outcome(backend.name, device, case, worst=float("inf"), failed=failure)
    failed = None if worst <= 1.0 else f"its error is {worst:.3g} times the permitted one"
    return Outcome(backend.name, device, case, worst=worst, failed=failed)


def _document(outcomes: list[Outcome], seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "passed": sum(o.skipped is None and not o.failed for o in outcomes),
        "skipped": sum(o.skipped is not None for o in outcomes),
        "failed": sum(o.failed is not None for o in outcomes),
        "cases": [
            {
                "backend": o.backend,
                "device": o.device,
                "case": o.case.name,
                "format": o.case.weight,
                "result": "skipped" if o.skipped else "failed" if o.failed else "passed",
                "reason": o.skipped or o.failed,
                "worst_error_ratio": None if o.skipped else o.worst,
            }
            for o in outcomes
        ],
    }


def _show(outcomes: list[Outcome], seed: int, stopped: bool) -> None:
    from microscale.cli.output import grid, say, show

    columns = ("backend", "device", "format", "passed", "skipped", "failed", "worst error")
    rows = grid(*columns, right=columns[3:])
    by_format: dict[tuple[str, str, str], list[Outcome]] = {}
    reasons: dict[tuple[str, str], int] = {}
    idle = dict.fromkeys((o.backend, o.device) for o in outcomes)
    for o in outcomes:
        by_format.setdefault((o.backend, o.device, o.case.weight), []).append(o)
        if o.skipped is None:
            idle.pop((o.backend, o.device), None)
        else:
            key = (f"{o.backend} on {o.device}", o.skipped)
            reasons[key] = reasons.get(key, 0) + 1
    for (backend, device, fmt), group in by_format.items():
        if (backend, device) in idle:
            continue
        ran = [o for o in group if o.skipped is None]
        bad = sum(o.failed is not None for o in ran)
        worst = f"{max(o.worst for o in ran):.2f}" if ran else ""
        rows.add_row(backend, device, fmt, str(len(ran) - bad), str(len(group) - len(ran)), str(bad), worst)
    if rows.row_count:
        show(rows)
        say("worst error: as a fraction of what is permitted; up to 1 passes")
    for (who, why), count in reasons.items():
        say(f"skipped {count} of {who}: {why}")
    for o in outcomes:
        if o.failed:
            say(f"FAILED {o.backend} on {o.device}: {o.case.name}: {o.failed}", style="bold red")
    ran_count = sum(o.skipped is None for o in outcomes)
    failures = sum(o.failed is not None for o in outcomes)
    verdict = "nothing ran" if not ran_count else f"{failures} failed" if failures else "all passed"
    rest = "; stopped at the first failure" if stopped else ""
    say(f"{ran_count} cases ran, {verdict}{rest}; repeat with --seed {seed}", style="bold")
