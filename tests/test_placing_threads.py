"""Threads that call a layer for the first time at once: one of them places it, and all compute with that."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.canary import Placer
from placed_layers import K, experts, layer, routed

THREADS = 4


def at_once(call: Callable[[], Tensor]) -> list[Tensor]:
    start = Barrier(THREADS)

    def one(_: int) -> Tensor:
        start.wait(60)
        return call()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


@pytest.fixture
def slow(either: Placer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each placement waits for a moment, in which a thread without a lock would begin its own; what was placed."""
    made: list[str] = []

    def slowly(name: str, place: Callable[..., Any]) -> Callable[..., Any]:
        def placed(*args: Any) -> Any:
            made.append(name)
            time.sleep(0.2)
            return place(*args)

        return placed

    for name in ("linear", "moe"):
        monkeypatch.setattr(either, name, slowly(name, getattr(either, name)))
    return made


def test_a_linear(either: Placer, slow: list[str]) -> None:
    linear, _ = layer(either)
    x = torch.randn(3, K)
    ys = at_once(lambda: linear(x))
    assert slow == ["linear"]
    assert all(torch.equal(y, linear(x)) for y in ys)


def test_experts(either: Placer, slow: list[str]) -> None:
    host, _ = experts(either)
    args = routed()
    ys = at_once(lambda: host(*args))
    assert slow == ["moe"]
    assert all(torch.equal(y, host(*args)) for y in ys)
