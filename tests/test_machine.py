"""Detection on this machine, and the sizes that environment variables give."""

from __future__ import annotations

import subprocess
import sys

import pytest

from microscale import env, machine
from microscale.errors import MicroscaleError
from microscale.machine import detect


def test_detect_describes_this_machine() -> None:
    machine = detect()
    assert machine.cores >= 1
    assert machine.memory > 1 << 28
    assert machine.cpu
    assert machine.torch
    assert machine.level in ("amx", "avx512_bf16", "avx512", "avx2", "neon", "plain")
    assert detect() is machine


@pytest.mark.parametrize(
    "error, words",
    [
        (
            ModuleNotFoundError("No module", name="microscale._core"),
            "it could not be compiled when microscale was",
        ),
        (
            ImportError("undefined symbol: ms_moe"),
            "it is there, but cannot be loaded: undefined symbol: ms_moe",
        ),
    ],
)
def test_a_core_that_is_absent_or_broken(
    monkeypatch: pytest.MonkeyPatch, error: ImportError, words: str
) -> None:
    class Raises:
        def find_spec(self, name: str, *args: object) -> None:
            if name == "microscale._core":
                raise error

    monkeypatch.delitem(sys.modules, "microscale._core", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Raises(), *sys.meta_path])
    core, missing = machine._core()
    assert core == ""
    assert missing.startswith(words)


def test_flags_are_those_of_the_operating_system() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc/cpuinfo exists on Linux only")
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        text = file.read()
    for flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile"):
        assert (flag in detect().isa) == (f" {flag} " in text.replace("\n", " "))


@pytest.mark.parametrize(
    "text, size",
    [
        ("0", 0),
        ("123", 123),
        ("1k", 1000),
        ("1KiB", 1024),
        ("1.5GiB", 3 << 29),
        ("64MiB", 64 << 20),
        ("2 GB", 2 * 10**9),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert env.parse_bytes(text, "X") == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1TiB", "1e9", "nan", "1 2"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(MicroscaleError, match=r"X=.* is not a size"):
        env.parse_bytes(text, "X")


def test_unknown_canary_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROSCALE_CANARY", "often")
    with pytest.raises(MicroscaleError, match=r"MICROSCALE_CANARY='often'; known: class, all, off"):
        env.canary()


def test_import_is_light() -> None:
    """The package imports torch and nothing heavier, so that `--help` and `doctor` answer at once."""
    code = "import sys, microscale; print([m for m in ('transformers', 'rich', 'typer') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
