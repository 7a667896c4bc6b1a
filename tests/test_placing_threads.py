"""Threads that call a layer for the first time at once: one of them places it. Interrupts meanwhile lose no weight."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.canary import Placer
from microscale.nn import QuantLinear, runner_of
from microscale.quant_experts import QuantExperts
from placed_layers import K, assert_same, cloned, experts, layer, routed

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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_places(either: Placer, slow: list[str]) -> None:
    """It has none of that thread's lock, and the weights whole."""
    linear, w = layer(either)
    x = torch.randn(3, K)
    wanted = QuantLinear(cloned(w), linear.bias, either)(x)
    slow.clear()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(linear, x)
        while not slow:
            time.sleep(0.01)
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # the end of one that waits for ever
            os._exit(0 if torch.equal(linear(x), wanted) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Interrupted(dict[str, Any]):
    """Tensors of a module of which only so many are replaced before somebody interrupts."""

    def __init__(self, tensors: dict[str, Any], left: int) -> None:
        super().__init__(tensors)
        self.left = left

    def __setitem__(self, name: str, t: Any) -> None:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        super().__setitem__(name, t)


@pytest.mark.parametrize("left", range(5))
def test_an_interrupt_while_a_linear_lets_go_of_its_weight(placer: Placer, left: int) -> None:
    linear, w = layer(placer)
    twin, x = QuantLinear(cloned(w), linear.bias, placer), torch.randn(3, K)
    own = linear._buffers
    linear._buffers = Interrupted(own, left)
    with pytest.raises(KeyboardInterrupt) if left < 4 else nullcontext():
        linear(x)
    assert_same(linear.weight, w)
    linear._buffers = dict(linear._buffers)
    assert_same(linear.weight, w)
    assert torch.equal(linear(x), twin(x))


@pytest.mark.parametrize("left", range(3))
def test_an_interrupt_while_experts_let_go_of_their_weights(placer: Placer, left: int) -> None:
    host, weights = experts(placer)
    args = routed()
    runner = runner_of(host)
    assert isinstance(runner, QuantExperts)
    wanted = copy.deepcopy(host)(*args)
    host._buffers = Interrupted(host._buffers, left)
    with pytest.raises(KeyboardInterrupt) if left < 2 else nullcontext():
        host(*args)
    host._buffers = dict(host._buffers)
    for found, w in zip(runner.weights[:2], weights, strict=True):
        assert_same(found, replace(w, rule=None))
    assert torch.equal(host(*args), wanted)
