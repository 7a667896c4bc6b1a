"""The interactive part of `microscale run`: a conversation, or, without a chat template, one completion per line."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from microscale.cli.session import Session, note, rates, write
from microscale.errors import MicroscaleError

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops a reply or forgets a line"


def converse(session: Session, read: Callable[[str], str] = input) -> None:
    """Read lines and answer them until the user leaves.

    A chat sends the whole conversation each time; what no longer fits the context is an error, not dropped.
    """
    if find_spec("readline"):
        import readline  # noqa: F401 (line editing and history for input())
    note(HELP if session.chat else f"no chat template: each line is completed on its own. {HELP}")
    history: list[dict[str, str]] = []
    while True:
        try:
            line = read("> ")
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:  # mostly of somebody who stopped a reply that had just ended
            write("\n")
            continue
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            history.clear()
        elif line.strip():
            _answer(session, line, history)


def _answer(session: Session, line: str, history: list[dict[str, str]]) -> None:
    asked = [*history, {"role": "user", "content": line}]
    try:
        _, ids = session.encode_chat(asked) if session.chat else session.encode(line)
        result = session.generate(ids, write, interruptible=True)
    except MicroscaleError as error:
        note(f"{error}; /reset forgets the conversation")
        return
    write("\n")
    note(rates(result))
    if session.chat:
        history[:] = [*asked, {"role": "assistant", "content": result.text}]
