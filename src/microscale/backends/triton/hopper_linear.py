"""Linears of many tokens on Hopper in CUDA C++, `hopper_linear.cu`, for cuts that are `wide`.

Tokens of a linear lie together, so the memory's copying engine brings them a box at a time, as the driver describes it.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from microscale.backends.triton import hopper_wide, linear_rows, nvrtc
from microscale.backends.triton.cuts import Cut
from microscale.backends.triton.fragments import Fragments
from microscale.backends.triton.hopper_wide import address, float_kind, spec_of

_GROUP = 8  # tiles of tokens that take turns with the rows, so that both are found in the cache
_BOX_COLUMNS = 64  # 128 bytes, which are swizzled
_BFLOAT16, _SWIZZLE_128_BYTES, _FETCH_256_BYTES = 9, 3, 3  # of CUtensorMap's types

Boxes = ctypes.c_ubyte * 128


class Given(ctypes.Structure):
    """The kernel's argument, as the text has it."""

    _fields_ = [
        ("boxes", Boxes * 3),
        *[(n, ctypes.c_uint64) for n in ("y", "codes", "scales", "ratios", "row_scale", "bias")],
        *[
            (n, ctypes.c_int)
            for n in (
                *("units", "blocks", "group", "rests", "rest_blocks"),
                *("tokens", "usual", "each", "rows", "tiles", "chunks"),
            )
        ],
        ("_", ctypes.c_ubyte * 64),  # the text's ends at a multiple of so many
    ]


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def box_map(x: Tensor, rows: int) -> bytes:
    """A CUtensorMap for boxes of so many rows, up to 256, and 64 columns.

    Args:
        x: [M, K] bfloat16, contiguous and at a multiple of 16 bytes; K a multiple of 8.

    Raises:
        CompileError: the driver is too old, or has another opinion of the sizes; other kernels take over.
    """
    m, k = x.shape
    return _encoded(x.data_ptr(), (k, m), (2 * k,), (_BOX_COLUMNS, rows))


def box_map_of_rows(codes: Tensor) -> bytes:
    """A CUtensorMap for boxes of 64 rows and 128 columns, in the order that `copy_rows` of `hopper_ptx.h` has them.

    Args:
        codes: [N, K] uint8, contiguous and at a multiple of 16 bytes; N a multiple of 32, K of 16.

    Raises:
        CompileError: as `box_map`.
    """
    n, k = codes.shape
    sizes, strides = (k // 2, 2, 4, 4, n // 32), (k, 8 * k, 2 * k, 32 * k)
    return _encoded(codes.data_ptr(), sizes, strides, (_BOX_COLUMNS, 2, 4, 4, 2))


@lru_cache(4096)
def _encoded(at: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """The description of numbers of 16 bits at an address, which says nothing of what lies there. `strides`: bytes, of
    all extents but the first."""
    room = ctypes.create_string_buffer(128 + 64)
    found = -(-ctypes.addressof(room) // 64) * 64  # as the driver wants it
    encode = getattr(_driver(), "cuTensorMapEncodeTiled", None)
    if encode is None:
        raise nvrtc.CompileError("the driver is older than CUDA 12 and describes no boxes")
    rank = len(sizes)
    error = encode(
        ctypes.c_void_p(found), _BFLOAT16, rank, ctypes.c_void_p(at),
        (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank), 0, _SWIZZLE_128_BYTES, _FETCH_256_BYTES, 0,
    )  # fmt: skip
    if error:
        raise nvrtc.CompileError(f"boxes of {box[1:]} rows of {sizes[::-1]}: the driver's error {error}")
    return ctypes.string_at(found, 128)


def linear(x: Tensor, w: Fragments, bias: Tensor | None, cut: Cut) -> Tensor:
    """[M, K] bfloat16, contiguous and at a multiple of 16 bytes -> [M, N]."""
    m, n = x.shape[0], w.shape[-2]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    programs = linear_rows.programs(cut, m, w.tiles)
    last = (m - programs.tokens) % cut.rest if cut.rest else m % cut.block_m
    boxes = (box_map(x, rows) if rows else bytes(128) for rows in (cut.block_m, cut.rest, last))
    given = Given(
        (Boxes * 3)(*map(Boxes.from_buffer_copy, boxes)),
        y.data_ptr(), w.codes.data_ptr(), w.scales.data_ptr(), address(w.ratios), address(w.row_scale),
        address(bias), programs.full, -(-w.tiles // cut.tiles), _GROUP, programs.rest,
        -(-w.tiles // cut.rest_tiles) if cut.rest else 0, m, programs.tokens, cut.block_m, n, w.tiles, w.chunks,
    )  # fmt: skip
    spec = spec_of(False, (w,), cut, bias=(float_kind(bias),), rest=cut.rest)
    hopper_wide.launch(spec, x.device, programs.full + programs.rest, given)
    return y
