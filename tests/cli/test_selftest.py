"""`microscale selftest`: a few cases, and backends that break them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made import document
from typer.testing import Result

import microscale.backends
from microscale import conformance
from microscale.backends import emulation
from microscale.conformance import Case
from microscale.oracle import Backend, Problem

Cli = Callable[..., Result]


def few(large: bool = False) -> Iterator[Case]:
    for name in ("mxfp4", "nvfp4"):
        yield Case("linear", name, 2, 16, 32)
        yield Case("moe", name, 2, 32, 32, experts=2, top_k=1, activation=conformance.SILU)
    if large:
        yield Case("linear", "mxfp4", 1, 64, 64)


def no_moe(problem: Problem) -> str | None:
    return None if problem.op == "linear" else "it has no MoE"


def scaled(by: float) -> Callable[..., Any]:
    def linear(*args: Any, **kwargs: Any) -> torch.Tensor:
        return emulation.linear(*args, **kwargs) * by

    return linear


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("kernel launch failed\nin a place far away")


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The modules behind the names of a table of the test's own."""
    modules: dict[str, Any] = {"good": emulation, "half": emulation}
    table = tuple(
        Backend(name, name, refuse, "")
        for name, refuse in (
            ("never", lambda p: "it never runs"),
            ("half", no_moe),
            ("good", lambda p: None),
        )
    )
    monkeypatch.setattr(microscale.backends, "table", lambda: table)
    monkeypatch.setattr(microscale.backends, "load", lambda backend: modules[backend.name])
    monkeypatch.setattr(conformance, "cases", few)
    return modules


def test_every_backend_that_does_not_refuse_is_tested(cli: Cli) -> None:
    result = cli("selftest", "--seed", "11", "--device", "cpu")
    assert result.exit_code == 0
    rows = [
        line.split()[:6] for line in result.stdout.splitlines() if " cpu " in line and "skipped" not in line
    ]
    assert rows == [
        ["half", "cpu", "mxfp4", "1", "1", "0"],
        ["half", "cpu", "nvfp4", "1", "1", "0"],
        ["good", "cpu", "mxfp4", "2", "0", "0"],
        ["good", "cpu", "nvfp4", "2", "0", "0"],
    ]
    assert "skipped 4 of never on cpu: it never runs\n" in result.stdout
    assert "skipped 2 of half on cpu: it has no MoE\n" in result.stdout
    assert "6 cases ran, all passed; repeat with --seed 11\n" in result.stdout
    assert result.stderr == ""


def test_the_seed_is_printed_and_differs(cli: Cli) -> None:
    seeds = {document(cli("selftest", "--backend", "half", "--json"))["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_a_wrong_result_fails_and_says_by_how_much(cli: Cli, backends: dict[str, Any]) -> None:
    backends["half"] = SimpleNamespace(pack=emulation.pack, unpack=emulation.unpack, linear=scaled(1.5))
    result = cli("selftest", "--backend", "half", "--device", "cpu")
    assert result.exit_code == 1
    assert "FAILED half on cpu: linear-mxfp4-a16-bf16-M2-N16-K32-bias: its error is" in result.stdout
    assert "2 cases ran, 2 failed" in result.stdout


def test_an_exception_fails_and_its_first_line_is_kept(cli: Cli, backends: dict[str, Any]) -> None:
    backends["half"] = SimpleNamespace(pack=emulation.pack, unpack=emulation.unpack, linear=broken)
    found = document(cli("selftest", "--backend", "half", "--device", "cpu", "--json"))
    failed = [c for c in found["cases"] if c["result"] == "failed"]
    assert found["failed"] == len(failed) == 2
    assert failed[0]["reason"] == "RuntimeError: kernel launch failed"
    assert failed[0]["worst_error_ratio"] is None


def test_fail_fast(cli: Cli, backends: dict[str, Any]) -> None:
    backends["good"] = SimpleNamespace(pack=broken)
    result = cli("selftest", "--backend", "good", "--device", "cpu", "--fail-fast")
    assert result.exit_code == 1
    assert "1 cases ran, 1 failed; stopped at the first failure" in result.stdout


def test_the_same_seed_gives_the_same_errors(cli: Cli) -> None:
    first, second = (
        document(cli("selftest", "--backend", "good", "--seed", "5", "--json")) for _ in range(2)
    )
    assert first == second


def test_nothing_ran_is_no_success(cli: Cli) -> None:
    result = cli("selftest", "--backend", "never", "--device", "cpu")
    assert result.exit_code == 1
    assert "0 cases ran, nothing ran" in result.stdout


def test_large_adds_cases(cli: Cli) -> None:
    small = document(cli("selftest", "--backend", "half", "--device", "cpu", "--json"))
    large = document(cli("selftest", "--backend", "half", "--device", "cpu", "--large", "--json"))
    assert large["passed"] == small["passed"] + 1


def test_unknown_names(cli: Cli) -> None:
    result = cli("selftest", "--backend", "godo")
    assert result.exit_code == 2
    assert "unknown backend 'godo'; did you mean good? known: never, half, good" in result.stderr
    assert cli("selftest", "--device", "abacus").exit_code == 2
