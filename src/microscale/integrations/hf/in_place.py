"""Steps in place of a model's forward: a call that brings a step's cache takes that step, once its prompt is in.

Several may run at once, of several decoders or threads. One dispatcher stands for all of them, goes by the cache, and
goes away with the last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

_NAMES = ("forward", "prepare_inputs_for_generation")
_changing = Lock()


class _Stand:
    """What stands in a model: the steps by their caches, and what stood there before, None where the class's did."""

    def __init__(self, model: Any) -> None:
        self.steps: dict[int, Any] = {}
        self.before = {name: model.__dict__.get(name) for name in _NAMES}
        self.forward: Callable[..., Any] = model.forward


_stands: WeakKeyDictionary[Any, _Stand] = WeakKeyDictionary()


def forward_of(model: Any) -> Callable[..., Any]:
    """A model's forward without any step."""
    stand = _stands.get(model)
    found: Callable[..., Any] = model.forward if stand is None else stand.forward
    return found


def replacement(model: Any) -> Any:
    """The forward that somebody else has given a model in place of its class's, or None; no step counts."""
    stand = _stands.get(model)
    return model.__dict__.get("forward") if stand is None else stand.before["forward"]


@contextmanager
def in_place_of(model: Any, step: Any) -> Iterator[None]:
    """While it lasts, a model that is called with the step's cache takes the step."""
    key = id(step.cache)
    with _changing:
        stand = _stands.get(model)
        if stand is None:
            stand = _Stand(model)
            model.__dict__.update(_dispatchers(model, stand))
            _stands[model] = stand
        stand.steps[key] = step
    try:
        yield
    finally:
        with _changing:
            del stand.steps[key]
            if not stand.steps:
                del _stands[model]
                for name, old in stand.before.items():
                    if old is None:
                        del model.__dict__[name]
                    else:
                        model.__dict__[name] = old


def _dispatchers(model: Any, stand: _Stand) -> dict[str, Callable[..., Any]]:
    forward, inputs, steps = stand.forward, model.prepare_inputs_for_generation, stand.steps

    @functools.wraps(forward)  # transformers reads the signature
    def forward_or_step(*args: Any, **kwargs: Any) -> Any:
        step = steps.get(id(kwargs.get("past_key_values")))
        if step is None:
            return forward(*args, **kwargs)
        if step.cache.length:
            return step(kwargs["input_ids"])
        output = forward(*args, **kwargs)
        step.cache.start(kwargs["input_ids"].shape[1])
        return output

    @functools.wraps(inputs)
    def inputs_or_token(input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        step = steps.get(id(kwargs.get("past_key_values")))
        if step is not None and step.cache.length:
            return {"input_ids": input_ids[:, -1:], "past_key_values": step.cache}
        found: dict[str, Any] = inputs(input_ids, *args, **kwargs)
        return found

    return {"forward": forward_or_step, "prepare_inputs_for_generation": inputs_or_token}
