"""The `microscale` command. Commands import what they need when they run: `--help` answers at once."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from microscale import env
from microscale.cli import bench, doctor, explain, inspect, run, selftest
from microscale.cli import eval as evaluation
from microscale.cli.output import clean, emit, only_json
from microscale.errors import CheckpointWarning, MicroscaleError, one_line

ERROR, INTERRUPTED = 2, 130
UNREAD = 141  # as of a program that SIGPIPE ends: 1 would be a verdict


class _Group(TyperGroup):
    """Turns this package's errors into one line and an exit code, wherever in the command line --debug stands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take --debug out of the options, in front of the command or behind it."""
        end = args.index("--") if "--" in args else len(args)
        ctx.obj = {"debug": "--debug" in args[:end], "json": "--json" in args[:end]}
        return super().parse_args(ctx, [a for i, a in enumerate(args) if i >= end or a != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return self._invoke(ctx)
        except BrokenPipeError:
            for stream in (sys.stdout, sys.stderr):
                _abandon(stream)
            raise typer.Exit(UNREAD) from None

    def _invoke(self, ctx: Any) -> Any:
        with only_json() if ctx.obj["json"] else nullcontext():
            try:
                return super().invoke(ctx)
            except MicroscaleError as error:
                if ctx.obj["debug"]:
                    traceback.print_exc()
                _say(type(error), str(error), ctx.obj["json"])
                raise typer.Exit(ERROR) from error
            except KeyboardInterrupt:
                if ctx.obj["debug"]:
                    traceback.print_exc()
                print("microscale: interrupted", file=sys.stderr)
                raise typer.Exit(INTERRUPTED) from None
            except Exception as error:  # whoever reads JSON is owed a document; `main` says and ends the rest
                # Exits, and errors of the command line, are no errors of a command: these have a code already.
                coded = hasattr(error, "exit_code") or isinstance(error, typer.Abort | BrokenPipeError)
                if ctx.obj["json"] and not coded:
                    with suppress(OSError):  # it may be stdout that failed
                        emit(_error(type(error), _unforeseen(error)))
                raise


def _error(kind: type[BaseException], message: str) -> dict[str, dict[str, str]]:
    return {"error": {"type": kind.__name__, "message": message}}


def _unforeseen(error: Exception) -> str:
    """What is said of an error that nobody foresaw; those of the operating system say it themselves."""
    if isinstance(error, OSError):
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)} (not foreseen: --debug shows where)"


def _say(kind: type[BaseException], message: str, as_json: bool) -> None:
    if as_json:
        emit(_error(kind, message))
    print(f"microscale: error: {clean(message)}", file=sys.stderr)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(run.run)
app.command()(explain.explain)
app.command()(inspect.inspect)
app.command("eval")(evaluation.evaluate)
app.add_typer(bench.bench, name="bench")
app.command()(selftest.selftest)
app.command()(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from microscale import __version__

        print(f"microscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show the traceback of an error; may stand behind the command, too."),
    ] = False,
) -> None:
    """Run language models with block-scaled weights (MXFP4, NVFP4 ...) exactly, on the machine you have."""


def main(args: Sequence[str] | None = None) -> None:
    """Run and exit: 0 done, 1 checked and found wanting, 2 an error, 130 interrupted, 141 nobody reads on."""
    env.wait_quietly()
    _have_streams()
    warnings.showwarning = partial(_warn, warnings.showwarning)
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks is no reason to stop.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if args is None else args)
    options = words[: words.index("--")] if "--" in words else words
    try:
        app(words)
    except KeyboardInterrupt:  # before the command began
        print("microscale: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 (what nobody foresaw; a user is owed a line, and the traceback on request)
        if "--debug" in options:
            traceback.print_exc()
        _abandon(sys.stdout)
        _say(type(error), _unforeseen(error), as_json=False)
        sys.exit(ERROR)


def _warn(others: Callable[..., None], message: Warning | str, category: type[Warning], *rest: Any) -> None:
    """A line for what is ours to say; `others` shows the rest."""
    if issubclass(category, CheckpointWarning):
        print(f"microscale: warning: {clean(str(message))}", file=sys.stderr)
    else:
        others(message, category, *rest)


def _have_streams() -> None:
    """Where a shell closed stdin, stdout or stderr (`>&-`), read nothing, and write nowhere.

    Python has None for them then, and the next file that is opened would get their numbers, and what is written there.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 (for all that follows)
            setattr(sys, name, stream)


def _abandon(stream: TextIO) -> None:
    """Let nothing more go to a stream that takes nothing: Python would try again, and fail, at its end."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
