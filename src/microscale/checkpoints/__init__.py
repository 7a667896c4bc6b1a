"""Checkpoints: safetensors mapped lazily, a producer's layout turned into `QuantTensor`s, nothing executed.

`open_checkpoint` is the way in. A dialect is one module (see `dialect.Dialect`) and a line in `DIALECTS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from microscale.checkpoints import gpt_oss, plain
from microscale.checkpoints.config import CONFIG, architecture, quant_method, read_config
from microscale.checkpoints.dialect import Dialect, Entry
from microscale.checkpoints.header import TensorInfo
from microscale.checkpoints.source import Source
from microscale.checkpoints.writer import write
from microscale.errors import CheckpointError, brief
from microscale.quant import QuantTensor

DIALECTS: tuple[Dialect, ...] = (gpt_oss, plain)
_DIALECT = {d.NAME: d for d in DIALECTS}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint: everything about it is checked, nothing of its data is read.

    Attributes:
        path: the directory.
        config: config.json.
        source: the tensors by their names in the files.
        dialect: name of the dialect that read it.
        groups: what each tensor is; every name of the source is in exactly one entry.
    """

    path: Path
    config: dict[str, Any]
    source: Source
    dialect: str
    groups: tuple[Entry, ...]

    def load(self, entry: Entry) -> Tensor | QuantTensor:
        """An entry's numbers, as views of the files: a `QuantTensor` where it has a format."""
        if entry.format is None:
            return self.source.tensor(entry.tensors[0])
        return _DIALECT[self.dialect].load(self.source, entry)


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a directory with config.json and safetensors.

    Raises:
        CheckpointError: anything about it that is not exactly right, or quantised by a method not known here.
    """
    path = Path(directory)
    try:
        found = path.is_dir()
    except OSError as e:
        raise CheckpointError(path, f"cannot be read: {e.strerror or e}") from e
    if not found:
        raise CheckpointError(path, "no such directory")
    config = read_config(path)
    dialect = dialect_of(config, path)
    source = Source.open(path)
    return Checkpoint(path, config, source, dialect.NAME, tuple(dialect.read(source, config)))


def dialect_of(config: dict[str, Any], directory: Path) -> Dialect:
    """The dialect that a checkpoint's config names.

    Raises:
        CheckpointError: none that is known here.
    """
    method = quant_method(config, directory / CONFIG)
    dialect = next((d for d in DIALECTS if d.matches(config)), None)
    if dialect is None:
        known = ", ".join(method for d in DIALECTS for method in d.METHODS)
        raise CheckpointError(
            directory / CONFIG,
            f"unknown quant_method {brief(method)}; known: {known}, or none (not quantised)",
        )
    return dialect


__all__ = [
    "DIALECTS",
    "Checkpoint",
    "Dialect",
    "Entry",
    "Source",
    "TensorInfo",
    "architecture",
    "dialect_of",
    "open_checkpoint",
    "read_config",
    "write",
]
