"""Files that commands write: whole or not at all, and only what could be written is measured."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from microscale.errors import MicroscaleError


def check_writable(path: Path | None) -> None:
    """Before minutes of measuring what could not be written after them. None: nothing is to be written.

    Raises:
        MicroscaleError: a directory, or nothing can be written there.
    """
    if path is None:
        return
    try:
        if _is_device(path):
            return
        if path.is_dir():
            raise MicroscaleError(f"{path}: is a directory")
        target = _target(path)
        if not target.parent.is_dir():
            raise MicroscaleError(f"{target}: there is no directory {target.parent}")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise MicroscaleError(f"{path}: nothing can be written there: {error.strerror or error}") from error


def write_file(path: Path, content: bytes) -> None:
    """The whole file or none: beside it first, then in its place. A link stays one: what it leads to is written.

    Raises:
        MicroscaleError: it cannot be written.
    """
    try:
        if _is_device(path):
            path.write_bytes(content)
            return
        path = _target(path)
        beside = path.with_name(f".microscale.{os.getpid()}.partial")  # whatever the length of the name
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise MicroscaleError(f"{path}: {error.strerror or error}") from error


def _target(path: Path) -> Path:
    """What links lead to, which may not be there yet; a loop of links is an OSError."""
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        path.stat()
    return path


def _is_device(path: Path) -> bool:
    """A device, pipe or socket: written to, and never replaced by a file."""
    return path.exists() and not path.is_file() and not path.is_dir()
