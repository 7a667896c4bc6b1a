"""Models of any architecture that are not quantised: bf16, fp16 or fp32 numbers as they are."""

from __future__ import annotations

import re
from typing import Any

import torch

from microscale.checkpoints.config import CONFIG, quant_method
from microscale.checkpoints.dialect import FLOATS, Entry
from microscale.checkpoints.source import Source
from microscale.errors import CheckpointError
from microscale.quant import QuantTensor

NAME = "plain"
METHODS: tuple[str, ...] = ()

_PACKED = re.compile(r"q?weight|.*_(blocks|scales|packed)$")


def matches(config: dict[str, Any]) -> bool:
    """No word of quantisation in the config."""
    return quant_method(config, CONFIG) is None


def read(source: Source, config: dict[str, Any]) -> list[Entry]:
    """One entry for each tensor. Integer buffers (position ids, masks) pass; an integer weight does not.

    Raises:
        CheckpointError: a floating dtype other than bf16, fp16, fp32, or an integer weight.
    """
    del config
    entries = []
    for info in source:
        module, _, role = info.name.rpartition(".")
        if info.dtype not in FLOATS if info.dtype.is_floating_point else _PACKED.match(role):
            wide = info.dtype is torch.float64
            raise CheckpointError(
                info.file,
                "wrong dtype"
                if wide
                else "quantised, but config.json has no quantization_config, so its scales are unknown",
                tensor=info.name,
                expected=" or ".join(map(str, FLOATS)),
                found=info.dtype,
            )
        entries.append(Entry(module, role, None, (info.name,), info.shape))
    return entries


def load(source: Source, entry: Entry) -> QuantTensor:
    """Never called: no entry of this dialect has a format."""
    raise CheckpointError(source.path, "is not quantised", tensor=entry.tensors[0])
