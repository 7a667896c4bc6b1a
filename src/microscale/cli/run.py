"""`microscale run`: complete a prompt, or chat."""

from __future__ import annotations

import os
import random
import select
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microscale.cli.output import SEED
from microscale.errors import MicroscaleError, PromptError

if TYPE_CHECKING:
    from microscale.cli.generate import Generation
    from microscale.cli.session import Session

_LONGEST = 1 << 28  # characters that stdin is read for: it may have no end

# What `microscale run` shows without arguments: a class that the bundled model can go on with in many ways.
PROMPT = '''class Stack:
    """A last-in, first-out collection."""

    def __init__(self):
        self._items = []

    def push(self, item):
        self._items.append(item)

    def '''
_TEMPERATURE, _SEED = 0.8, 0  # of that alone: greedily, a model so small soon repeats itself


def run(
    model: Annotated[
        str | None, typer.Argument(help="Directory, hub id, or bundled name; the bundled model if left out.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text to go on from; token ids for a model without a tokenizer. Left out: stdin, or a chat."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: the likeliest token. Default: what the checkpoint says, else 0."),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0, max=1, help="Sample from this share only.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(**SEED, help="Of sampling; a new one each time if left out.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="The only backend allowed.")] = None,
    act: Annotated[
        str, typer.Option(help="How activations are stored: a16, a8, a6, a4, or a format.")
    ] = "a16",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the first GPU if left out.")
    ] = None,
    canary: Annotated[
        str | None,
        typer.Option(help="class: prove each distinct choice once (default); all: every layer; off."),
    ] = None,
    load_format: Annotated[
        str,
        typer.Option(
            "--load-format", help="auto: read the weights; dummy: random ones in the config's shapes."
        ),
    ] = "auto",
    layers: Annotated[int | None, typer.Option(help="--load-format dummy: the first layers only.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: if there is one.")
    ] = None,
    graph: Annotated[
        bool,
        typer.Option(
            "--graph/--no-graph",
            help="Replay each token where that can be: from a CUDA graph, on a CPU from one chain of kernels.",
        ),
    ] = True,
    timing: Annotated[
        bool,
        typer.Option(
            "--timing", help="Where a token's time goes, and what reading alone would take; on CPUs and CUDA."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, at the end.")] = False,
) -> None:
    """Complete a prompt and stream the text; without one on a terminal, chat. Timings go to stderr.

    microscale run

    microscale run gpt-oss-20b --load-format dummy --layers 2
    """
    from microscale.models import BUNDLED

    _check(backend, act, device, canary, load_format)
    if timing:
        _check_timing(device)
    from microscale.cli.generate import Settings
    from microscale.cli.session import check_ids, note, open_session, tokenizer_of, write

    name = BUNDLED if model is None else model
    tokenizer = tokenizer_of(name)
    if model is not None and prompt is None and tokenizer is not None:
        if not sys.stdin.isatty():
            prompt = _all_of_stdin()
        elif as_json:
            raise MicroscaleError("--json needs a prompt")
    if tokenizer is None and prompt is not None:
        check_ids(name, prompt)
    built_in = model is None and prompt is None and not (prompt := _waiting_on_stdin())
    if built_in:
        prompt = PROMPT
        temperature = _TEMPERATURE if temperature is None else temperature
        seed = _SEED if seed is None else seed
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    session = open_session(
        name,
        Settings(max_new_tokens, temperature, top_p, seed),
        chat,
        tokenizer,
        timing=timing,
        graph=graph,
        device=device,
        backend=backend,
        act=act,
        canary=canary,
        load_format=load_format,
        layers=layers,
    )
    if model is not None and prompt is None and tokenizer is not None:
        from microscale.cli.chat import converse

        note(session.report(None))
        converse(session)
        return
    text, ids = session.encode(prompt)
    if as_json:
        from microscale.cli.output import emit

        emit(_document(session, text, session.generate(ids, lambda _: None)))
        return
    if built_in or (sys.stdout.isatty() and not session.chat):
        write(text)
    result = session.generate(ids, write)
    write("\n")
    note(session.report(result))


def _check(backend: str | None, act: str, device: str | None, canary: str | None, load_format: str) -> None:
    """Refuse bad words before anything is loaded."""
    from microscale.backends import table
    from microscale.cli.explain import check_act
    from microscale.cli.output import known
    from microscale.env import CANARIES
    from microscale.integrations.hf.loading import target_device

    check_act(act)
    known(load_format, ("auto", "dummy"), "load format")
    if backend is not None:
        known(backend, [b.name for b in table()], "backend")
    if canary is not None:
        known(canary, CANARIES, "canary")
    target_device(device)


def _check_timing(device: str | None) -> None:
    """Refuse what `--timing` cannot see, before anything is loaded."""
    from microscale.machine import detect

    machine = detect()
    kind = (device or machine.device).partition(":")[0]
    if kind == "cuda":
        if "triton" not in dict(machine.packages):
            raise MicroscaleError("--timing looks at Triton's kernels: the package triton is not installed")
    elif kind != "cpu":
        raise MicroscaleError(f"--timing knows CPUs and CUDA, and the model would run on {kind}")
    elif not machine.core:
        raise MicroscaleError(f"--timing looks into the C++ core: {machine.core_missing}")


def _waiting_on_stdin() -> str | None:
    """What was piped in by now, if anything. Never waits: `microscale run` in a script must not hang."""
    if sys.stdin.isatty() or os.name != "posix":
        return None
    try:
        ready, _, _ = select.select([sys.stdin], [], [], 0)
    except (OSError, ValueError):  # no file behind it
        return None
    return _all_of_stdin() if ready else None


def _all_of_stdin() -> str:
    try:
        text = sys.stdin.read(_LONGEST + 1)
    except UnicodeDecodeError as error:
        raise MicroscaleError(f"the prompt on stdin is not {error.encoding}: {error.reason}") from None
    if len(text) > _LONGEST:
        raise PromptError(f"the prompt on stdin goes on behind {_LONGEST} characters")
    return text


def _document(session: Session, prompt: str, result: Generation) -> dict[str, Any]:
    return {
        "model": session.name,
        "device": str(session.model.device),
        "prompt": prompt,
        "prompt_ids": result.prompt_ids,
        "text": result.text,
        "ids": result.ids,
        "stopped": result.stopped,
        "seed": session.settings.seed,
        "samples": session.settings.samples(session.model),
        "seconds": {"load": session.loading, "prefill": result.prefill, "decode": result.decode},
        "graph": {
            "replayed": result.eager is None,
            "fused": result.fused,
            "why_not": result.eager,
            "why_modules": result.why_modules,
        },
        "tokens_per_second": {"prefill": result.prefill_rate, "decode": result.decode_rate},
        **({"timing": result.timing.document()} if result.timing is not None else {}),
        "layers": session.layers(),
    }
