"""Every error microscale raises on purpose. All derive from `MicroscaleError`, so one `except` serves a caller."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

_short = reprlib.Repr()
_short.maxstring = 160
brief = _short.repr  # hostile values end up in messages, never whole


_LONGEST = 400  # characters of what an error of others says: as little as of a hostile value itself


def one_line(error: BaseException) -> str:
    """What an error of others says, in a line: its first one, with the second where that ends in a colon.

    Of a long one the beginning and the end: others put whole values in the middle.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]}...{line[3 - _LONGEST // 2 :]}"


class MicroscaleError(Exception):
    """Base of all errors of this package. The message is one a user can act on."""


class FormatError(MicroscaleError, ValueError):
    """A tensor cannot be stored in, or read from, a format: wrong shape, dtype, scale rule or unknown name."""


class SettingError(MicroscaleError):
    """A setting has a value that cannot be followed. Never a reason to take the next backend."""


class PromptError(MicroscaleError, ValueError):
    """There is nothing to go on from, or tokens that a model does not have."""


class PackedError(MicroscaleError, AttributeError):
    """Packed weights were taken for a tensor, by code that knows layers with plain ones."""


class BackendError(MicroscaleError, ValueError):
    """A backend was called with operands that contradict each other (the message has both values)."""


class NoBackendError(MicroscaleError, LookupError):
    """Every backend refused a problem. Carries all reasons, in the order tried.

    Attributes:
        refused: (backend name, sentence) pairs.
    """

    def __init__(self, problem: object, refused: Sequence[tuple[str, str]]) -> None:
        self.refused = tuple(refused)
        lines = "\n".join(f"- {name}: {why}" for name, why in self.refused)
        super().__init__(f"no backend for {problem}:\n{lines}")


class CheckpointWarning(UserWarning):
    """A checkpoint holds more than was read of it."""


class CheckpointError(MicroscaleError, ValueError):
    """A checkpoint cannot be read as what it says it is.

    Attributes:
        path: file or directory at fault.
        tensor: tensor name, where one is at fault.
        expected, found: the two values that disagree, where there are two.
    """

    def __init__(
        self,
        path: object,
        problem: str,
        *,
        tensor: str | None = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        self.path = str(path)
        self.problem = problem
        self.tensor = tensor
        self.expected = expected
        self.found = found
        parts = [self.path]
        if tensor is not None:
            parts.append(f"tensor {tensor!r}")
        text = f"{': '.join(parts)}: {problem}"
        if expected is not None or found is not None:
            text += f" (expected {expected}, found {found})"
        super().__init__(text)
