"""What transformers reports of a load and goes on from: an error here, whatever the dialects have checked before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from microscale import CheckpointError
from microscale.errors import CheckpointWarning
from microscale.integrations.hf.loading import _check_complete

WHERE = Path("somewhere")


@pytest.mark.parametrize(
    "info, said",
    [
        ({"missing_keys": {"b", "a"}}, "tensor 'a': 2 tensors missing"),
        ({"mismatched_keys": {("w", (1,), (2,))}}, "1 tensors of the wrong shape"),
        (
            {"unexpected_keys": {"x.weight_scale", "y"}},
            "tensor 'x.weight_scale': 1 scales that nothing reads",
        ),
    ],
    ids=["missing", "mismatched", "scales"],
)
def test_what_is_missing_misshapen_or_unread_is_an_error(info: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        _check_complete(WHERE, info)
    assert said in str(caught.value)


def test_what_else_nothing_reads_is_a_warning() -> None:
    found = {"missing_keys": set(), "mismatched_keys": None, "unexpected_keys": {"tower.weight", "a"}}
    with pytest.warns(CheckpointWarning, match="2 tensors that the model of its config.json has no use for"):
        _check_complete(WHERE, found)


def test_nothing_is_said_of_a_whole_model(recwarn: pytest.WarningsRecorder) -> None:
    _check_complete(WHERE, {"missing_keys": set(), "mismatched_keys": None, "unexpected_keys": set()})
    assert not recwarn
