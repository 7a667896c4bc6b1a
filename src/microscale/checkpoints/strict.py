"""JSON from files nobody vouches for: bounded size, depth and time, no duplicate keys, one kind of error."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from microscale.errors import CheckpointError, brief

MAX_DEPTH = 64
# Bounds the parser's memory (about 100 bytes a value) and time. A tensor takes 6 to 9 of a shard's header.
MAX_VALUES = 1_000_000

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def open_regular(path: Path) -> BinaryIO:
    """Open for reading what is, links followed, a regular file: a pipe would block, a device has no end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(path, "is not a regular file")
        return path.open("rb")
    except OSError as e:
        raise CheckpointError(path, f"cannot be read: {e.strerror or e}") from e


def read_object(path: Path, max_bytes: int, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object that is a whole file; see `parse_object`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise CheckpointError(path, "is too large", expected=f"at most {max_bytes} bytes", found=size)
        raw = read(path, file, size)
    return parse_object(path, raw, constants=constants)


def read(path: Path, file: BinaryIO, count: int) -> bytes:
    """At most `count` bytes."""
    try:
        return file.read(count)
    except OSError as e:
        raise CheckpointError(path, f"cannot be read: {e.strerror or e}") from e


def parse_object(path: Path, raw: bytes, *, constants: bool = False) -> dict[str, Any]:
    """One JSON object in UTF-8.

    Args:
        path: for the message.
        raw: the bytes; whitespace around the object is allowed.
        constants: accept NaN and Infinity, which JSON has not but Python writes: Nemotron-H configs hold
            `"time_step_limit": [0.0, Infinity]`.
    Raises:
        CheckpointError: anything else, `MAX_DEPTH` or `MAX_VALUES` exceeded, or a key given twice.
    """
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_VALUES or raw.count(b'"') > 4 * MAX_VALUES:
        raise CheckpointError(path, f"JSON has more than {MAX_VALUES} values")
    if _depth(raw) > MAX_DEPTH:
        raise CheckpointError(path, f"JSON is nested more than {MAX_DEPTH} deep")

    def number(text: str) -> float:
        if len(text) > 400:
            raise ValueError(f"number of {len(text)} digits")
        value = float(text)
        if not constants and not math.isfinite(value):
            raise ValueError(f"{text[:40]} is not a JSON number")
        return value

    try:
        text = raw.decode()
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=number,
            parse_constant=number,
        )
        if "\\u" in text:  # a lone surrogate is no character: it could not be printed, nor name a file
            json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as e:
        raise CheckpointError(path, f"JSON is not UTF-8: {e.reason}") from None
    except ValueError as e:
        raise CheckpointError(path, f"invalid JSON: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, "JSON is not an object", expected="object", found=type(value).__name__)
    return value


def _depth(raw: bytes) -> int:
    """Deepest nesting of brackets outside strings, exact up to where parsing would stop."""
    if raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH:
        return 0
    brackets = np.frombuffer(_STRING.sub(b"", raw).translate(None, _NOT_BRACKETS), np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), np.int32(1), np.int32(-1))
    return int(steps.cumsum(dtype=np.int32).max(initial=0))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {brief(twice)}")
    return unique


def _integer(text: str) -> int:
    if len(text) > 20:  # no 64-bit integer is longer, and int() is quadratic
        raise ValueError(f"integer of {len(text)} digits")
    return int(text)
