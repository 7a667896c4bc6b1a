"""Shared fixtures: a fresh seed per test, printed; `torch.empty` poisoned with NaN while a test runs."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from ahead import begun, end
from placed_layers import either, placer, repacker  # noqa: F401 (fixtures)

torch.set_num_threads(1)  # tensors here are small, and a busy neighbour then cannot stall a barrier

with torch.device("meta"):
    # The first use of a device context notes which functions it redirects: it must see the real `torch.empty`,
    # or a model built "on meta" inside a test would take its whole memory.
    torch.empty(0)

_EMPTY = torch.empty
_EMPTY_LIKE = torch.empty_like
_NEW_EMPTY = torch.Tensor.new_empty


def _poison(t: torch.Tensor) -> torch.Tensor:
    """Fill with what no correct result contains: NaN, or 0xAA bytes for integers."""
    if t.device.type == "meta" or t.numel() == 0:
        return t
    if t.is_floating_point() and t.element_size() > 1:
        return t.fill_(float("nan"))
    if t.dtype == torch.bool:
        return t.fill_(True)
    if not t.is_floating_point() and not t.is_complex():
        return t.fill_(0xAA & torch.iinfo(t.dtype).max)
    return t


def pytest_collection_finish(session: pytest.Session) -> None:
    """What takes minutes begins now, see `ahead`."""
    if session.config.option.collectonly:
        return
    for item in session.items:
        ahead = getattr(getattr(item, "module", None), "ahead", None)
        for function, job in ahead(item) if callable(ahead) else ():
            begun(function, job)


def pytest_sessionfinish() -> None:
    end()


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that a kernel forgets to write must not look right by accident."""
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(_EMPTY(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(_EMPTY_LIKE(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(_NEW_EMPTY(*a, **k)))


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh seed for every test; repeat a failure with MICROSCALE_TEST_SEED=<the printed number>."""
    value = int(os.environ.get("MICROSCALE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"seed: MICROSCALE_TEST_SEED={value}")  # pytest shows it with a failure
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)
    return value
