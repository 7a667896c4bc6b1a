"""The C++ core without Python: its own tests under sanitizers, and the symbols of what is compiled for one level."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ahead import begun

ROOT = Path(__file__).parent.parent
TOOLS = ("cmake", "ninja", "c++")
REQUIRED = os.environ.get("MICROSCALE_TEST_CORE") == "required"


def found(name: str) -> str | None:
    """A program of this environment or of the machine."""
    return shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )


def tool(name: str) -> str:
    """The same, which has to be there."""
    where = found(name)
    if where is None:
        sentence = f"{name} is not installed, so the C++ core cannot be built here"
        pytest.fail(sentence) if REQUIRED else pytest.skip(sentence)
    return where


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@cache
def place() -> TemporaryDirectory[str]:
    """Where the core is built, until this process ends."""
    return TemporaryDirectory(prefix="microscale-core-")


def compiled(where: str) -> None:
    """All of csrc/ and its tests, with address and undefined-behaviour sanitizers."""
    cmake, ninja = tool("cmake"), tool("ninja")
    # The tiles of AMX in memory, so that its kernels run on any machine with AVX-512-BF16.
    names = {"MODULE": "OFF", "TESTS": "ON", "SANITIZE": "ON", "EMULATE_AMX": "ON"}
    options = [f"-DMICROSCALE_{name}={value}" for name, value in names.items()]
    run(cmake, "-S", str(ROOT), "-B", where, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options)
    run(cmake, "--build", where)


def ahead(item: pytest.Function) -> Iterator[tuple[Callable[[str], None], str]]:
    """What a test waits for."""
    if "build" in item.fixturenames and all(map(found, TOOLS)):
        yield compiled, place().name


@pytest.fixture(scope="module")
def build() -> Path:
    """Of `compiled`."""
    for name in TOOLS:
        tool(name)
    begun(compiled, place().name).result()
    return Path(place().name)


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
