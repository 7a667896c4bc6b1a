"""Writing a checkpoint: whole, or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from microscale.checkpoints.config import CONFIG, read_config
from microscale.checkpoints.header import DTYPES
from microscale.checkpoints.source import INDEX, SINGLE, Source
from microscale.checkpoints.strict import parse_object
from microscale.errors import CheckpointError

# A shard's data starts on a cache line, and so does each tensor that follows whole lines.
ALIGNMENT = 64

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(
    directory: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json and safetensors shards into a new directory.

    All goes to a hidden directory beside it, is flushed to the disk, read back (headers only), and renamed:
    `directory` never exists half-written, and an error or interrupt leaves nothing behind (a killed process
    leaves the hidden one). Only tensors not contiguous or not on the CPU take memory, one at a time.

    Args:
        directory: must not exist, or be empty; or a link to such a one.
        config: becomes config.json.
        state: tensors by name, stored in this order as far as alignment allows.
        max_shard_bytes: of tensor data; a larger single tensor gets a shard of its own. One shard is
            model.safetensors; more are numbered and come with an index.
    Raises:
        CheckpointError: directory in the way, disk full, a tensor that safetensors cannot hold, or a config that
            `read_config` would refuse.
    """
    # "." has no name to derive one from, and no link is renamed to.
    directory = Path(os.path.realpath(directory))
    settings = json.dumps(dict(config), indent=2) + "\n"
    # Before gigabytes are written beside it.
    parse_object(directory / CONFIG, settings.encode(), constants=True)
    for name, t in state.items():
        if t.dtype not in _NAMES:
            raise CheckpointError(directory, f"safetensors cannot hold {t.dtype}", tensor=name)
        if t.layout != torch.strided or t.is_meta:
            where = "on the meta device" if t.is_meta else f"in layout {t.layout}"
            raise CheckpointError(directory, f"a tensor {where} has no bytes to write", tensor=name)
    partial = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.partial"
    try:
        if directory.exists() and any(directory.iterdir()):
            raise CheckpointError(directory, "exists and is not an empty directory")
        directory.parent.mkdir(parents=True, exist_ok=True)
        total, free = sum(map(_nbytes, state.values())), shutil.disk_usage(directory.parent).free
        if total > free:
            raise CheckpointError(directory, "disk too full", expected=f"{total} bytes", found=f"{free} free")
        partial.mkdir()
        _write_all(partial, settings, state, max_shard_bytes)
        Source.open(partial)
        read_config(partial)
        partial.rename(directory)
        _sync_directory(directory.parent)
    except OSError as e:
        raise CheckpointError(directory, f"cannot be written: {e.strerror or e}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_all(partial: Path, settings: str, state: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, t in state.items():
        if shards[-1] and filled + _nbytes(t) > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = t
        filled += _nbytes(t)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_shard(partial / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(map(_nbytes, state.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(partial / INDEX, json.dumps(index, indent=2) + "\n")
    _write_text(partial / CONFIG, settings)
    _sync_directory(partial)


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Large elements first: each tensor then starts on a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for name, t in ordered:
        shape = list(t.shape)
        if t.dtype == torch.float4_e2m1fn_x2:
            shape[-1] *= 2
        header[name] = {
            "dtype": _NAMES[t.dtype],
            "shape": shape,
            "data_offsets": [offset, offset + _nbytes(t)],
        }
        offset += _nbytes(t)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for _, t in ordered:
            if t.numel():
                file.write(
                    t.detach().cpu().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().data
                )
        _sync(file)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        _sync(file)


def _nbytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make names in a directory last; Windows has no such call, and keeps names in its journal."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
