"""The C++ core without Python: its own tests under sanitizers, and the symbols of what is compiled for one level."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REQUIRED = os.environ.get("MICROSCALE_TEST_CORE") == "required"


def tool(name: str) -> str:
    """A program of this environment or of the machine."""
    found = shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if found is None:
        sentence = f"{name} is not installed, so the C++ core cannot be built here"
        pytest.fail(sentence) if REQUIRED else pytest.skip(sentence)
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of csrc/ and its tests, with address and undefined-behaviour sanitizers."""
    where = tmp_path_factory.mktemp("core")
    cmake, ninja = tool("cmake"), tool("ninja")
    tool("c++")
    # The tiles of AMX in memory, so that its kernels run on any machine with AVX-512-BF16.
    names = {"MODULE": "OFF", "TESTS": "ON", "SANITIZE": "ON", "EMULATE_AMX": "ON"}
    options = [f"-DMICROSCALE_{name}={value}" for name, value in names.items()]
    run(cmake, "-S", str(ROOT), "-B", str(where), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options)
    run(cmake, "--build", str(where))
    return where


def test_the_cores_own_tests_pass_under_sanitizers(build: Path) -> None:
    out = run(tool("ctest"), "--test-dir", str(build), "--output-on-failure")
    assert "100% tests passed" in out
    assert "out of 0" not in out


def test_units_of_one_level_export_their_table_alone(build: Path) -> None:
    """A weak symbol compiled for a wide level could be the copy that the linker keeps for every machine."""
    nm = tool("nm")
    kinds = ("isa", "dense", "attend", "small", "ceilings")
    units = [unit for kind in kinds for unit in build.rglob(f"{kind}_*.cc.o")]
    assert len(units) >= len(kinds)
    for unit in units:
        kind, _, level = unit.name.removesuffix(".cc.o").partition("_")
        table = f"{level}_{'kernels' if kind == 'isa' else kind}"
        symbols = [line.split() for line in run(nm, str(unit)).splitlines()]
        shared = {words[-1] for words in symbols if words[-2] in "BCDGRSTVWu" and "asan" not in words[-1]}
        assert shared == {f"_ZN10microscale{len(table)}{table}E"}, unit.name
