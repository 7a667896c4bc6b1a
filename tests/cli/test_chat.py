"""Chats of `microscale run`, and how settings become transformers', on tiny models with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from microscale import MicroscaleError
from microscale.cli.chat import converse
from microscale.cli.generate import Generation, Settings
from microscale.cli.session import Session, open_session, tokenizer_of


@pytest.fixture(scope="module")
def session(chatty: Path) -> Session:
    return open_session(str(chatty), Settings(max_new_tokens=4), None, tokenizer_of(str(chatty)))


def lines(*given: str) -> Callable[[str], str]:
    waiting: Iterator[str] = iter(given)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return read


def asked_of(session: Session, monkeypatch: pytest.MonkeyPatch, answer: Any = None) -> list[str]:
    """Prompts that reach the model, as text."""
    seen: list[str] = []

    def generate(ids: list[int], write: Callable[[str], None], interruptible: bool = False) -> Generation:
        seen.append(session.tokenizer.decode(ids))
        if isinstance(answer, Exception):
            raise answer
        write("yes")
        return Generation(ids, [1, 2], "yes", 0.1, 0.1)

    monkeypatch.setattr(session, "generate", generate)
    return seen


def test_a_chat_remembers_until_reset(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = asked_of(session, monkeypatch)
    converse(session, lines("a", "", "b", "/reset", "c", "/exit", "never"))
    assert seen == ["[user]a[assistant]", "[user]a[assistant]yes[user]b[assistant]", "[user]c[assistant]"]


def test_a_chat_outlives_an_error(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = asked_of(session, monkeypatch, MicroscaleError("too long"))
    converse(session, lines("a", "b"))
    assert seen == ["[user]a[assistant]", "[user]b[assistant]"]
    assert "too long" in capsys.readouterr().err


def test_an_interrupt_at_the_prompt_ends_no_chat(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """It came for a reply that had just ended, or to forget a line."""
    seen, given = asked_of(session, monkeypatch), lines("a", "interrupt", "b")

    def read(prompt: str) -> str:
        line = given(prompt)
        if line == "interrupt":
            raise KeyboardInterrupt
        return line

    converse(session, read)
    assert seen == ["[user]a[assistant]", "[user]a[assistant]yes[user]b[assistant]"]


def test_without_a_template_each_line_stands_alone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "chat", False)
    seen = asked_of(session, monkeypatch)
    converse(session, lines("a", "b"))
    assert seen == ["a", "b"]


def test_an_interrupted_reply_keeps_what_was_said(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    real = session.model.generate

    def interrupted(**options: Any) -> None:
        real(**(options | {"max_new_tokens": 2}))
        raise KeyboardInterrupt

    monkeypatch.setattr(session.model, "generate", interrupted)
    result = session.generate([1, 2, 3], said.append, interruptible=True)
    assert (result.stopped, len(result.ids)) == ("interrupted", 2)
    assert "".join(said) == result.text
    with pytest.raises(KeyboardInterrupt):
        session.generate([1, 2, 3], said.append)


def test_the_models_own_end_is_told_from_the_length(session: Session) -> None:
    first = session.generate([1, 2, 3], lambda _: None).ids[0]
    config = session.model.generation_config
    before, config.eos_token_id = config.eos_token_id, first
    try:
        result = session.generate([1, 2, 3], lambda _: None)
    finally:
        config.eos_token_id = before
    assert (result.stopped, result.ids, result.decode) == ("end", [first], 0.0)
    assert result.decode_rate == 0.0


@pytest.mark.parametrize(
    "settings, expected",
    [
        (Settings(), {}),
        (Settings(temperature=0), {"do_sample": False}),
        (Settings(temperature=0.5), {"do_sample": True, "temperature": 0.5}),
        (Settings(top_p=0.9), {"do_sample": True, "top_p": 0.9}),
        (Settings(temperature=0, top_p=0.9), {"do_sample": False, "top_p": 0.9}),
    ],
)
def test_settings_for_transformers(settings: Settings, expected: dict[str, Any]) -> None:
    config = SimpleNamespace(eos_token_id=None, pad_token_id=None, do_sample=False)
    assert settings.arguments(SimpleNamespace(generation_config=config)) == expected


def test_ends_without_padding_get_the_first_end_as_padding() -> None:
    config = SimpleNamespace(eos_token_id=[7, 8], pad_token_id=None, do_sample=False)
    assert Settings().arguments(SimpleNamespace(generation_config=config)) == {"pad_token_id": 7}


def test_a_template_that_fails_is_an_error(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.tokenizer, "chat_template", "{{ raise_exception('no system role') }}")
    with pytest.raises(MicroscaleError, match=r"the chat template of .* fails: no system role"):
        session.encode("hi")


def test_a_template_cannot_reach_python(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    monkeypatch.setattr(session.tokenizer, "chat_template", attack)
    with pytest.raises(MicroscaleError, match="chat template"):
        session.encode("hi")


def test_generation_does_not_move_the_global_seed_of_a_greedy_run(session: Session) -> None:
    first = session.generate([1, 2, 3], lambda _: None).ids
    torch.manual_seed(123)
    assert session.generate([1, 2, 3], lambda _: None).ids == first
