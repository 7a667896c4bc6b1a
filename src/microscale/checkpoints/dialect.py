"""What a dialect is: one module that says what each tensor of a producer's checkpoint stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from microscale.checkpoints.source import Source
from microscale.errors import CheckpointError
from microscale.quant import QuantTensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Entry:
    """One logical tensor of a model.

    Attributes:
        module: e.g. "model.layers.0.mlp.experts".
        role: what the module calls it ("weight", "bias", "sinks" ...); of fused experts "w13", "w2",
            "w13_bias", "w2_bias".
        format: name of a block-scaled format; None for plain numbers.
        tensors: names in the file, in the dialect's order.
        shape: logical: [..., N, K] whatever the packing.
    """

    module: str
    role: str
    format: str | None
    tensors: tuple[str, ...]
    shape: tuple[int, ...]


class Dialect(Protocol):
    """The functions that a dialect's module has."""

    @property
    def NAME(self) -> str:
        """The word for it."""

    @property
    def METHODS(self) -> tuple[str, ...]:
        """The quant_method words that it answers to."""

    def matches(self, config: dict[str, Any]) -> bool:
        """The config says that the checkpoint is in this dialect."""

    def read(self, source: Source, config: dict[str, Any]) -> list[Entry]:
        """What every tensor is, each exactly once. Checks all names, dtypes and shapes; reads no data.

        Raises:
            CheckpointError: tensors missing, unexpected, or at odds with the config.
        """

    def load(self, source: Source, entry: Entry) -> QuantTensor:
        """An entry that has a format, as views of the map where its bytes allow."""


def plain_entry(source: Source, name: str, shape: tuple[int, ...], role: str | None = None) -> Entry:
    """An unpacked tensor, checked. Without a `role`, the last part of the name is it."""
    expect(source, name, FLOATS, shape)
    module, _, last = name.rpartition(".")
    return Entry(module, role or last, None, (name,), shape)


def expect(source: Source, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """The tensor exists, in one of the dtypes and in the shape that the config asks for.

    Raises:
        CheckpointError: not so.
    """
    if name not in source:
        raise CheckpointError(
            source.path, "missing", tensor=name, expected=f"shape {list(shape)}", found="nothing"
        )
    info = source.info(name)
    if info.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise CheckpointError(info.file, "wrong dtype", tensor=name, expected=wanted, found=info.dtype)
    if info.shape != shape:
        raise CheckpointError(
            info.file,
            "shape disagrees with config.json",
            tensor=name,
            expected=list(shape),
            found=list(info.shape),
        )
