"""What Python code may hand over by mistake: a typed error, never a guess."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original import write

import microscale
from microscale import CheckpointError, FormatError, MicroscaleError
from microscale.errors import SettingError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write(path)
    return path


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"canary": "none"}, "unknown canary 'none'; known: class, all, off"),
        (
            {"dtype": "bogus"},
            "unknown dtype 'bogus'; known: auto, bf16, fp16, fp32, and torch's floating ones",
        ),
        ({"dtype": torch.int8}, "unknown dtype torch.int8"),
        ({"dtype": "nn"}, "unknown dtype 'nn'"),
        ({"dtype": None}, "unknown dtype None"),
        ({"trust_remote_code": True}, "code of a checkpoint is never run"),
    ],
)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_load(directory: Path, options: dict[str, Any], why: str, load_format: str) -> None:
    with pytest.raises(SettingError, match=why):
        microscale.load(directory, device="cpu", load_format=load_format, **options)


@pytest.mark.parametrize("word", ["fp32", "float32", torch.float32])
def test_words_for_a_dtype(directory: Path, word: Any) -> None:
    model = microscale.load(directory, device="cpu", dtype=word, canary="off", trust_remote_code=False)
    assert model.dtype is torch.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: "tiny",
        lambda: torch.nn.Linear(64, 64),
        lambda: torch.nn.Sequential(torch.nn.Linear(64, 64)),
    ],
)
def test_requantize_takes_models_of_transformers(make: Callable[[], Any]) -> None:
    with pytest.raises(CheckpointError, match="is no transformers model, which is what requantize takes"):
        microscale.requantize(make(), "mxfp4")


def test_requantize_knows_its_canaries(directory: Path) -> None:
    model = microscale.load(directory, device="cpu", canary="off")
    with pytest.raises(SettingError, match="unknown canary"):
        microscale.requantize(model, "mxfp4", canary="sometimes")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_numbers_are_not_cut_off(dtype: torch.dtype) -> None:
    q = microscale.quantize(torch.full((2, 32), 0.5), "mxfp4")
    with pytest.raises(FormatError, match="mxfp4 holds fractions, which torch"):
        microscale.dequantize(q, dtype)


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "/etc/passwd"])
def test_names_of_models(name: str) -> None:
    with pytest.raises(MicroscaleError, match=r"no such directory|is no directory; a model is one"):
        microscale.load(name)
