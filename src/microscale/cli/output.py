"""How commands talk: results on stdout (text, or one JSON document), everything else on stderr."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

from microscale.errors import MicroscaleError, brief

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SEED: Any = {"min": 0, "max": 2**63 - 1}  # the bounds of an option that seeds torch's generators
PIPED_WIDTH = 100  # columns of a table that goes to a file or a pipe

_JSON_STREAM: ContextVar[TextIO | None] = ContextVar("json_stream", default=None)

# A model's text and a checkpoint's names are not to move the cursor, ring, or rewrite the title of a terminal.
_CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), 127, *range(128, 160)) if chr(c) not in "\n\t"}


def console(*, stderr: bool = False) -> Console:
    """Where text goes. Tables are `PIPED_WIDTH` wide when it is no terminal; other lines are then never wrapped."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1, which is a verdict here
            raise BrokenPipeError

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPED_WIDTH
    return Piped(file=stream, width=width, highlight=False, markup=False, emoji=False)


def say(text: str = "", *, indent: int = 0, hang: int = 2, style: str = "", stderr: bool = False) -> None:
    """One paragraph: wrapped with a hanging indent on a terminal, one line elsewhere, so that it can be searched."""
    from rich.text import Text

    out = console(stderr=stderr)
    body = Text(clean(text), style)
    if not out.is_terminal:
        out.print(Text(" " * indent).append_text(body), soft_wrap=True)
        return
    for i, line in enumerate(body.wrap(out, max(out.width - indent - hang, 20))):
        line.rstrip()
        out.print(Text(" " * (indent + (hang if i else 0))).append_text(line))


def grid(*columns: str, right: Sequence[str] = (), wrap: Sequence[str] = ()) -> Table:
    """An empty table that never cuts: columns in `wrap` get narrower first; those in `right` hold numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        justify = "right" if name in right else "left"
        made.add_column(name, justify=justify, overflow="fold", no_wrap=name not in wrap)  # type: ignore[arg-type]
    return made


def show(table: Table) -> None:
    """Print a table, without the blanks at the ends of lines that padding makes."""
    out = console()
    with out.capture() as captured:
        out.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def emit(document: Any) -> None:
    """Print the one JSON document of a command; numbers that JSON has not (infinity, NaN) become null."""
    stream = _JSON_STREAM.get() or sys.stdout
    indent = 2 if stream.isatty() else None
    print(json.dumps(_finite(document), indent=indent, allow_nan=False), file=stream, flush=True)


@contextmanager
def only_json() -> Iterator[None]:
    """Send to stderr whatever a library prints on stdout; `emit` still reaches it."""
    token = _JSON_STREAM.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _JSON_STREAM.reset(token)


def human(size: float) -> str:
    """1158266880 -> "1.16 GB". Units are powers of 1000, as in bandwidths."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def clean(text: str) -> str:
    """`text` with control characters spelt out, but for line ends and tabs."""
    return text.translate(_CONTROLS)


def known(name: str, names: Iterable[str], what: str) -> str:
    """`name`, if it is one of `names`.

    Raises:
        MicroscaleError: it is not; says the nearest one and all of them.
    """
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise MicroscaleError(f"unknown {what} {brief(name)}; {hint}known: {', '.join(names)}")


def progress(items: Iterable[Any], what: str, total: int | None = None) -> Iterable[Any]:
    """A bar on stderr that is gone when done; nothing where stderr is no terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    bar: Iterable[Any] = tqdm(
        items, what, total, leave=False, disable=None, file=sys.stderr, dynamic_ncols=True
    )
    return bar


def quiet_libraries() -> None:
    """Keep what transformers and the hub log to themselves, and their bars where stderr is no terminal.

    Their errors, too: transformers raises what it logs as one, and logs whole configs with it.
    """
    from logging import CRITICAL

    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity(CRITICAL)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
