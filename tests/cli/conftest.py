"""Checkpoints made once, and a runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made import TEMPLATE, add_tokenizer, make_checkpoint
from typer.testing import CliRunner, Result

from microscale.cli import app


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("bare") / "tiny-bare")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, without a chat template."""
    return add_tokenizer(make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny"))


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer and a chat template."""
    return add_tokenizer(make_checkpoint(tmp_path_factory.mktemp("chatty") / "tiny-chat"), TEMPLATE)


@pytest.fixture(scope="session")
def nan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint one of whose scales is NaN."""
    return make_checkpoint(tmp_path_factory.mktemp("nan") / "tiny-nan", nan_scale=True)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command line in this process. Anything but an error that microscale means to raise is raised here."""
    for name in ("MICROSCALE_BACKEND", "MICROSCALE_CANARY"):
        monkeypatch.delenv(name, raising=False)

    def call(*args: str | Path, **options: Any) -> Result:
        return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False, **options)

    return call
