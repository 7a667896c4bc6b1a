"""`Source`: a checkpoint's tensors, as views of memory-mapped safetensors shards, read when used."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from microscale.checkpoints.header import TensorInfo, read_header
from microscale.checkpoints.strict import open_regular, read_object
from microscale.errors import CheckpointError, brief

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000

_LONGEST_NAME = 255  # that a file has on any system
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NO_PICKLES = "pickles are never loaded, since loading one runs code from it; convert to safetensors"


@dataclass(frozen=True)
class Index:
    """What says which tensors are in which shard.

    Attributes:
        path: of the file.
        metadata: what it has under this word, unchecked: shards do not need it.
        shards: names of tensors by the name of their file.
    """

    path: Path
    metadata: object
    shards: dict[str, set[str]]


class Source:
    """Named tensors in one safetensors file, or in the shards that an index lists.

    One read-only memory map (and, by Python's mmap, one file descriptor) for each file, kept by the tensors
    that view it. Files must not shrink while views are read: the system ends a process that reads beyond the end.

    Attributes:
        path: the directory or file that was opened.
        files: the safetensors files, in index order.
        index: of the shards, by its path; None: one file, without one.
        total_bytes: bytes of all tensors.
    """

    def __init__(
        self,
        path: Path,
        infos: dict[str, TensorInfo],
        maps: dict[Path, mmap.mmap],
        index: Index | None = None,
    ) -> None:
        """Use `Source.open`, which checks what is given here."""
        self.path = path
        self.index = index
        self.files = tuple(maps)
        self.total_bytes = sum(info.nbytes for info in infos.values())
        self._infos = infos
        self._maps = maps

    @classmethod
    def open(cls, path: str | Path) -> Source:
        """Check every header, and the index, then map the files.

        Args:
            path: a directory with model.safetensors, or model.safetensors.index.json, or one *.safetensors of
                any name (looked for in this order, as transformers does); or one such file.
        Raises:
            CheckpointError: no such thing, or anything about it that is not exactly right.
        """
        path = Path(path)
        found = _find(path)
        index = _read_index(found) if found.name.endswith(".json") else None
        files = [found] if index is None else [found.parent / shard for shard in index.shards]
        infos: dict[str, TensorInfo] = {}
        maps: dict[Path, mmap.mmap] = {}
        with ExitStack() as stack:
            # Headers are read from the same open files that are then mapped: none can be swapped in between.
            opened = {file: stack.enter_context(open_regular(file)) for file in files}
            sizes = {}
            for file, handle in opened.items():
                tensors = read_header(file, handle)
                if index is not None:
                    _check_shard(file, {t.name for t in tensors}, index.shards)
                infos.update((t.name, t) for t in tensors)
                sizes[file] = tensors[-1].offset + tensors[-1].nbytes
            _quiet()
            for file, handle in opened.items():
                try:
                    maps[file] = mmap.mmap(handle.fileno(), sizes[file], access=mmap.ACCESS_READ)
                except (OSError, ValueError) as e:
                    raise CheckpointError(file, f"cannot be mapped: {e}") from e
                handle.close()
        return cls(path, infos, maps, index)

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, by file and offset."""
        return tuple(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self._infos.values())

    def info(self, name: str) -> TensorInfo:
        """Where a tensor is, and its dtype and shape; reads nothing.

        Raises:
            CheckpointError: no such tensor.
        """
        if name not in self._infos:
            raise CheckpointError(self.path, "no such tensor", tensor=name)
        return self._infos[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor, as a view of the map. Never write to it: its pages are read-only, and a write is fatal.

        A tensor that its file does not align to the element size (before safetensors 0.4) is copied instead.

        Raises:
            CheckpointError: no such tensor, or its file has been cut short since it was opened.
        """
        info = self.info(name)
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype, device="cpu")
        data, size = self._maps[info.file], info.dtype.itemsize
        end, now = info.offset + info.nbytes, data.size()  # of the file, not of the map
        if end > now:
            problem = "its file was cut short after it was opened"
            raise CheckpointError(info.file, problem, tensor=name, expected=f"{end} bytes", found=now)
        if info.offset % size:
            raw = torch.frombuffer(data, dtype=torch.uint8, count=info.nbytes, offset=info.offset)
            return raw.clone().view(info.dtype).view(info.shape)
        # Not a slice of one storage for the file: tensors of equal storages are tied weights to transformers.
        flat = torch.frombuffer(data, dtype=info.dtype, count=info.nbytes // size, offset=info.offset)
        return flat.view(info.shape)


def _find(path: Path) -> Path:
    """The safetensors file or the index that `path` means."""
    try:
        if path.is_file():
            if path.suffix in _PICKLES:
                raise CheckpointError(path, _NO_PICKLES)
            if path.suffix != ".safetensors" and not path.name.endswith(".safetensors.index.json"):
                raise CheckpointError(path, "is neither a .safetensors file nor a .safetensors.index.json")
            return path
        if not path.is_dir():
            raise CheckpointError(path, "no such directory or file")
        for name in (SINGLE, INDEX):
            if os.path.lexists(path / name):  # a link to nowhere, too: it was meant to be there
                return path / name
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as e:
        raise CheckpointError(path, f"cannot be read: {e.strerror or e}") from e
    shards = [n for n in names if n.endswith(".safetensors")]
    if len(shards) == 1:
        return path / shards[0]
    if shards:
        raise CheckpointError(
            path, f"{len(shards)} .safetensors files and no {INDEX} to say which belong together"
        )
    if any(n.endswith(_PICKLES) for n in names):
        raise CheckpointError(path, f"only pickle files: {_NO_PICKLES}")
    raise CheckpointError(path, "is no model: there is no .safetensors file")


def _read_index(path: Path) -> Index:
    content = read_object(path, MAX_INDEX_BYTES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(path, "weight_map", expected="tensor: file, ...", found=brief(weight_map))
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                path, "shard", tensor=name[:200], expected="a .safetensors file", found=brief(shard)
            )
        # A name, not a path. The file itself may be a link out of the directory, as in Hugging Face's cache.
        if any(c in shard for c in "/\\:") or not shard.isprintable() or len(shard) > _LONGEST_NAME:
            raise CheckpointError(
                path, "shard", tensor=name[:200], expected="a file of this directory", found=brief(shard)
            )
        shards.setdefault(shard, set()).add(name)
    return Index(path, content.get("metadata"), shards)


def _check_shard(file: Path, found: set[str], listed: dict[str, set[str]]) -> None:
    """The shard has exactly the tensors that the index says."""
    expected = listed[file.name]
    if found == expected:
        return
    for name in sorted(found - expected):
        home = next((shard for shard, names in listed.items() if name in names), None)
        if home is not None:
            raise CheckpointError(
                file, "is in another shard than the index says", tensor=name, expected=home, found=file.name
            )
        raise CheckpointError(file, "is not in the index", tensor=name)
    raise CheckpointError(
        file, "the index says it is here, but it is not", tensor=min(expected - found)[:200]
    )


@cache
def _quiet() -> None:
    """Use up torch's once-only warning that a read-only buffer must not be written to: `tensor` says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)
