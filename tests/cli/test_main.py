"""The command line as a whole: help, errors, exit codes, streams."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from made import document
from typer.testing import Result

from microscale import CheckpointError, __version__
from microscale.cli import doctor as doctor_module
from microscale.cli.output import clean, human, known, only_json
from microscale.errors import MicroscaleError

Cli = Callable[..., Result]
COMMANDS = ("run", "explain", "inspect", "selftest", "doctor")


def process(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, *args]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, check=False
    )


def test_help_names_every_command(cli: Cli) -> None:
    result = cli("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(cli: Cli, name: str) -> None:
    result = cli(name, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    # torch takes 1.5 s to import, transformers 2 s. What the package itself imports is not the command line's to say.
    code = """
import sys
import microscale
had = set(sys.modules)
from microscale.cli import app
app(["run", "--help"], standalone_mode=False)
heavy = {"torch", "transformers", "huggingface_hub", "tokenizers", "safetensors", "numpy", "tqdm", "jinja2"}
print("heavy:", sorted(heavy & (set(sys.modules) - had)), "transformers" in sys.modules)
"""
    assert process("-c", code).stdout.splitlines()[-1] == "heavy: [] False"


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"microscale {__version__}\n"
    assert version("microscale") == __version__


def test_without_a_command_there_is_help_and_failure(cli: Cli) -> None:
    result = cli()
    assert result.exit_code == 2
    assert "Usage" in result.output


def test_an_error_is_one_line_on_stderr(cli: Cli, tmp_path: Path) -> None:
    result = cli("inspect", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("microscale: error: ")
    assert result.stderr.count("\n") == 1
    assert "no such directory" in result.stderr


@pytest.mark.parametrize(
    "arguments", [("--debug", "inspect", "/nowhere"), ("inspect", "/nowhere", "--debug")]
)
def test_debug_gives_the_traceback_wherever_it_stands(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert CheckpointError.__name__ in result.stderr


def test_debug_behind_two_dashes_is_an_argument(cli: Cli) -> None:
    result = cli("inspect", "--", "--debug")
    assert "'--debug'" in result.stderr or "--debug: no such directory" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_is_json_where_json_is_asked_for(cli: Cli) -> None:
    result = cli("inspect", "/nowhere", "--json")
    assert result.exit_code == 2
    assert document(result)["error"]["type"] == "CheckpointError"
    assert "microscale: error: " in result.stderr


def test_an_interrupt_is_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_module, "requirements", interrupt)
    result = cli("doctor")
    assert result.exit_code == 130
    assert result.stderr == "microscale: interrupted\n"


def test_control_characters_of_an_error_do_not_reach_the_terminal(cli: Cli) -> None:
    result = cli("inspect", "/nowhere\x1b[31m")
    assert "\x1b" not in result.output
    assert "\\x1b[31m" in result.stderr


def test_piped_output_has_no_escape_codes_and_the_exit_code_survives() -> None:
    shape = ("--op", "linear", "--format", "mxfp4", "--n", "64", "--k", "64")
    good = process("-m", "microscale.cli", "explain", *shape, "--all-machines")
    assert good.returncode == 0
    assert "\x1b" not in good.stdout
    assert good.stderr == ""
    assert all(line == line.rstrip() for line in good.stdout.splitlines())
    bad = process("-m", "microscale.cli", "explain", "--machine", "h20")
    assert bad.returncode == 2
    assert "did you mean h200?" in bad.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no broken pipes")
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    "command", [("explain", "--machine", "list"), ("explain", "--json"), ("inspect",), ("inspect", "nothing")]
)
def test_a_reader_who_is_gone_is_no_verdict(command: tuple[str, ...], both: bool) -> None:
    """`microscale inspect --require mxfp4 | head -1` in a shell with pipefail: 1 would be of the check."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "microscale.cli", *command]
    try:
        done = subprocess.run(
            words, stdout=writer, stderr=writer if both else subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    refused = command[-1] == "nothing" and not both  # on stderr, which has a reader
    assert done.returncode == (2 if refused else 141)
    assert both or refused or done.stderr == ""


def test_libraries_that_print_do_not_spoil_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    with only_json():
        print("a library says hello")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "a library says hello\n")


def test_known_suggests_and_lists() -> None:
    assert known("b", ("a", "b"), "letter") == "b"
    with pytest.raises(
        MicroscaleError, match=r"^unknown machine 'H20'; did you mean h200\? known: h200, mac$"
    ):
        known("H20", ("h200", "mac"), "machine")
    with pytest.raises(MicroscaleError, match=r"^unknown machine 'zzz'; known: h200, mac$"):
        known("zzz", ("h200", "mac"), "machine")


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (49152, "49.2 kB"), (999_600, "1 MB"), (1158266880, "1.16 GB"),
     (13_761_264_768, "13.8 GB"), (2e15, "2e+03 TB")],
)  # fmt: skip
def test_sizes_have_three_digits(size: float, text: str) -> None:
    assert human(size) == text


def test_clean_keeps_line_ends_and_tabs() -> None:
    assert clean("a\n\tb\x07\x1b[0m\x9b\x7f é") == "a\n\tb\\x07\\x1b[0m\\x9b\\x7f é"
