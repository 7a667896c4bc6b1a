"""`microscale doctor`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from made import document
from typer.testing import Result

import microscale.backends
import microscale.machine
from microscale import env
from microscale.cli import doctor
from microscale.invented import INVENTED
from microscale.machine import PACKAGES, Machine, detect
from microscale.oracle import Backend, Problem

Cli = Callable[..., Result]


def wants_humming(problem: Problem) -> str | None:
    if problem.op == "moe":
        return "it has no MoE"
    return None if "triton" in problem.packages else "the package triton is not installed"


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        Backend("humming", "", wants_humming, "fast"),
        Backend("emulation", "", lambda p: None, "slow"),
    )
    monkeypatch.setattr(microscale.backends, "table", lambda: made)


def test_what_is_here(cli: Cli) -> None:
    result = cli("doctor")
    assert result.exit_code == 0
    assert detect().cpu in result.stdout
    assert torch.__version__ in result.stdout
    assert f"({detect().level}, {detect().cores} cores" in result.stdout
    for name in env.VARIABLES:
        assert f"\n{name}: " in result.stdout


def test_what_became_of_the_core(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = INVENTED["zen5"]
    assert doctor.core(machine) == "compiled for levels up to amx; this machine's is avx512_bf16"
    without = replace(machine, core="", core_missing="it could not be compiled")
    said = "the C++ core is not in this installation: it could not be compiled"
    assert doctor.core(without) == said
    assert "C++ core " in cli("doctor").stdout


def test_the_json(cli: Cli) -> None:
    found = document(cli("doctor", "--json"))
    assert found["machine"]["level"] == detect().level
    assert {r["name"] for r in found["requirements"]} >= {"torch", "transformers", "typer"}
    assert [p["name"] for p in found["packages"]] == list(PACKAGES)
    assert found["core"] == doctor.core(detect())
    assert found["environment"].keys() == env.VARIABLES.keys()


def test_a_compiler_that_is_not_there_is_null(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for compiler, said in (("/usr/bin/g++", "/usr/bin/g++"), ("", None)):
        monkeypatch.setattr(microscale.machine, "detect", lambda at=compiler: replace(detect(), compiler=at))
        assert document(cli("doctor", "--json"))["compiler"] == said
    assert "\ncompiler         none; " in cli("doctor").stdout


def test_each_backend_says_what_it_lacks_and_what_to_install(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = tuple((name, version) for name, version in detect().packages if name != "triton")
    bare = replace(detect(), packages=without)
    monkeypatch.setattr(microscale.machine, "detect", lambda: bare)
    found = document(cli("doctor", "--json"))
    humming, emulation = (
        next(b for b in found["backends"] if b["name"] == n) for n in ("humming", "emulation")
    )
    assert emulation["runs"] == emulation["asked"] > 0
    assert humming["runs"] == 0
    half = humming["asked"] // 2
    assert {r["reason"]: r["count"] for r in humming["refusals"]} == {
        "it has no MoE": half,
        "the package triton is not installed": half,
    }
    package = next(p for p in found["packages"] if p["name"] == "triton")
    assert package["refused"] is None
    assert package["would_add"][f"humming on {humming['device']}"] == half
    assert "pip install triton: humming on" in cli("doctor").stdout


@pytest.mark.parametrize(
    "name, words",
    [("sapphire-rapids", "usable"), ("sapphire-rapids-no-amx", "refuses it"), ("zen5", "not in this CPU")],
)
def test_amx(name: str, words: str) -> None:
    assert words in doctor.amx(INVENTED[name])


def warnings(machine: Machine) -> str:
    return "\n".join(doctor.warnings(machine))


def here(**changes: Any) -> Machine:
    return replace(detect(), cores=10_000, **changes)


def test_a_machine_without_traps_has_no_warnings() -> None:
    assert "triton_kernels" not in warnings(here())
    assert "AMX" not in warnings(INVENTED["sapphire-rapids"])
    assert "AMX is in this CPU" in warnings(INVENTED["sapphire-rapids-no-amx"])


def test_more_threads_than_cores() -> None:
    assert "torch uses" not in warnings(here())
    few = replace(detect(), cores=0)
    assert "set OMP_NUM_THREADS=0" in warnings(few)


@pytest.mark.parametrize(
    "file, unrelated", [("triton_kernels/add_vectors.py", True), ("triton_kernels/matmul.py", False)]
)
def test_the_unrelated_triton_kernels(monkeypatch: pytest.MonkeyPatch, file: str, unrelated: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [PurePosixPath(file)])
    assert ("pip uninstall triton_kernels" in warnings(here())) is unrelated


@pytest.mark.parametrize(
    "file, unrelated", [("aiter/__init__.py", True), ("aiter/ops/gemm_op_a4w4.py", False)]
)
def test_the_unrelated_aiter(monkeypatch: pytest.MonkeyPatch, file: str, unrelated: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [PurePosixPath(file)])
    assert ("AMD's is amd-aiter" in warnings(here())) is unrelated


def test_a_package_of_another_version_is_said_to_be_unused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(detect(), packages=(("humming-kernels", "0.1.2"),))
    monkeypatch.setattr("microscale.machine.detect", lambda: old)
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1.2" if name == "humming-kernels" else None)
    found = document(cli("doctor", "--json"))
    package = next(p for p in found["packages"] if p["name"] == "humming-kernels")
    assert package["refused"].startswith(
        "humming-kernels 0.1.2 is installed, and the interface that was read is that of"
    )
    assert "0.1.2; not used: humming-kernels 0.1.2 is installed" in cli("doctor").stdout


def test_what_a_package_would_add_is_asked_with_the_version_that_was_read() -> None:
    from microscale.backends import BACKENDS

    humming = next(b for b in BACKENDS if b.name == "humming")
    problem = Problem("linear", "mxfp4", 64, 64).on(INVENTED["h200"])
    assert humming.refuse(problem) == "the package humming-kernels is not installed"
    assert humming.refuse(doctor.as_if(problem, "humming-kernels")) is None


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    assert "nvidia-smi is here, so there may be an NVIDIA GPU" in warnings(here(gpus=()))
    assert "nvidia-smi" not in warnings(here(gpus=INVENTED["h200"].gpus))


def test_an_unmet_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: ["torch<1", "nothing-of-this-name>=2", 'x; extra == "dev"'],
    )
    found = {r["name"]: r["satisfied"] for r in doctor.requirements()}
    assert found == {"torch": False, "nothing-of-this-name": False}
    assert "nothing-of-this-name>=2 is required, nothing is installed" in warnings(here())


def test_an_invalid_variable_is_a_warning_not_a_failure(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROSCALE_CANARY", "sometimes")
    monkeypatch.setenv("MICROSCALE_EMULATION_TILE", "1MiB")
    result = cli("doctor", "--json")
    assert result.exit_code == 0
    found = document(result)
    assert found["environment"]["MICROSCALE_EMULATION_TILE"]["value"] == 2**20
    assert "MICROSCALE_CANARY='sometimes'; known: class, all, off" in found["warnings"]


def test_what_no_run_would_take_is_a_warning(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROSCALE_BACKEND", "hummming")
    text = cli("doctor").stdout
    assert "MICROSCALE_BACKEND: invalid (name of" in text
    said = "WARNING: unknown backend of MICROSCALE_BACKEND 'hummming'; did you mean humming? known: humming, emulation"
    assert said in text
    monkeypatch.setenv("MICROSCALE_BACKEND", "humming")
    assert doctor.environment()["MICROSCALE_BACKEND"]["value"] == "humming"
    if detect().core:
        monkeypatch.setattr("microscale.backends.cpu_core._widest", lambda: 1)
        monkeypatch.setenv("MICROSCALE_CPU_LEVEL", "avx512")
        found = document(cli("doctor", "--json"))
        assert found["environment"]["MICROSCALE_CPU_LEVEL"]["value"] is None
        assert any(w.startswith("MICROSCALE_CPU_LEVEL=avx512, and the widest") for w in found["warnings"])
