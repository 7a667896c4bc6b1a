"""How the model being loaded is to run. transformers builds the quantiser itself, so this travels beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from microscale import env
from microscale.canary import Placer
from microscale.errors import SettingError


@dataclass(frozen=True)
class Options:
    """What `load` was asked for; the defaults are what plain `from_pretrained` gets.

    Attributes:
        backend: the only backend allowed; None: MICROSCALE_BACKEND, or the oracle's choice.
        act: "a16", "a8", "a6", "a4" or a format's name.
        canary: "class", "all" or "off"; None: MICROSCALE_CANARY.
        place: place layers as soon as they are loaded; False: the caller does, on the device it wants.
        checkpoint: the opened and checked checkpoint, if the caller has it.
    """

    backend: str | None = None
    act: str = "a16"
    canary: str | None = None
    place: bool = True
    checkpoint: Any = None

    def __post_init__(self) -> None:
        if self.canary not in (None, *env.CANARIES):
            raise SettingError(f"unknown canary {self.canary!r}; known: {', '.join(env.CANARIES)}")

    def placer(self) -> Placer:
        """A placer by these options."""
        return Placer(force=self.backend or env.backend(), canary=self.canary or env.canary())


_CURRENT: ContextVar[Options | None] = ContextVar("microscale_options", default=None)


def current_options() -> Options:
    """The options of the load under way."""
    return _CURRENT.get() or Options()


@contextmanager
def using(options: Options) -> Iterator[Options]:
    """Make these the options of loads in this context."""
    token = _CURRENT.set(options)
    try:
        yield options
    finally:
        _CURRENT.reset(token)
