"""The header of one safetensors file, checked in full before anything is mapped.

A file is the header's length (8 bytes, little endian), the header (a JSON object), then data, which the
tensors divide among them without overlap or hole. F4 counts numbers, not bytes, in its shape.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from microscale.checkpoints.strict import parse_object, read
from microscale.errors import CheckpointError, brief

MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound
MAX_NAME = 1024  # characters of a tensor's name
MAX_RANK = 64  # torch's TensorIterator takes no more dimensions

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,  # the file's shape counts numbers, torch's counts bytes of two
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor is.

    Attributes:
        name: as in the file.
        dtype, shape: of torch's tensor (F4: two numbers a byte, so half the file's last dimension).
        nbytes: bytes of data.
        file: the shard.
        offset: of the first byte, from the start of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


def read_header(path: Path, file: BinaryIO) -> list[TensorInfo]:
    """Every tensor of an open safetensors file, by offset. Reads the header only.

    Raises:
        CheckpointError: a byte sequence that is not exactly a safetensors file with at least one tensor.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = read(path, file, 9)
    if len(prefix) < 9:
        raise CheckpointError(path, f"a file of {size} bytes is no safetensors file")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            path,
            "header too long, or no safetensors file",
            expected=f"at most {MAX_HEADER_BYTES}",
            found=length,
        )
    if 8 + length > size:
        raise CheckpointError(path, "truncated inside the header", expected=f"{8 + length} bytes", found=size)
    if prefix[8:] != b"{":
        raise CheckpointError(path, "header does not start with '{'")
    header = parse_object(path, prefix[8:] + read(path, file, length - 1))

    data = 8 + length
    infos = []
    for name, fields in header.items():
        if name == "__metadata__":
            if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
                raise CheckpointError(path, "__metadata__ does not map strings to strings")
            continue
        infos.append(_tensor(path, name, fields, data, size))
    if not infos:
        raise CheckpointError(path, "holds no tensors")

    infos.sort(key=lambda i: (i.offset, i.nbytes))
    position = data
    for info in infos:
        if info.offset < position:
            raise CheckpointError(
                path,
                "overlaps another tensor",
                tensor=info.name,
                expected=f"offset {position}",
                found=info.offset,
            )
        if info.offset > position:
            raise CheckpointError(
                path,
                "bytes before it belong to no tensor",
                tensor=info.name,
                expected=f"offset {position}",
                found=info.offset,
            )
        position = info.offset + info.nbytes
    if position != size:
        raise CheckpointError(
            path, "bytes at the end belong to no tensor", expected=f"{position} bytes", found=size
        )
    return infos


def _tensor(path: Path, name: str, fields: Any, data: int, size: int) -> TensorInfo:
    """One entry, checked on its own; `data` and `size` are where the file's data begin and end."""
    if not name or len(name) > MAX_NAME:
        raise CheckpointError(
            path,
            f"a tensor's name has {len(name)} characters",
            expected=f"1 to {MAX_NAME}",
            found=brief(name),
        )

    def wrong(problem: str, expected: object, found: object) -> CheckpointError:
        return CheckpointError(path, problem, tensor=name, expected=expected, found=found)

    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("header entry", "dtype, shape and data_offsets", brief(fields))
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong("unknown dtype", f"one of {', '.join(DTYPES)}", brief(dtype))
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_natural, shape)):
        raise wrong("shape", f"at most {MAX_RANK} non-negative integers", brief(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise wrong("data_offsets", "two non-negative integers", brief(offsets))

    if dtype == "F4":
        if not shape or shape[-1] % 2:
            raise wrong("shape of F4, two numbers a byte", "an even last dimension", brief(shape))
        shape = [*shape[:-1], shape[-1] // 2]
    itemsize = DTYPES[dtype].itemsize
    numel, extent = 1, itemsize  # the extent takes empty dimensions as 1: strides must fit int64, too
    for n in shape:
        numel, extent = numel * n, extent * max(n, 1)
        if extent >= 2**63:
            raise wrong("shape overflows", "less than 2^63 bytes", brief(fields["shape"]))
    begin, end = offsets
    if end - begin != numel * itemsize:
        raise wrong("data_offsets disagree with dtype and shape", f"{numel * itemsize} bytes", end - begin)
    if data + end > size:
        raise wrong("ends past the end of the file: truncated?", f"{data + end} bytes", size)
    return TensorInfo(name, DTYPES[dtype], tuple(shape), end - begin, path, data + begin)


def _natural(value: object) -> bool:
    """A non-negative integer; JSON's true and false, which Python takes for 1 and 0, are not."""
    return type(value) is int and value >= 0
