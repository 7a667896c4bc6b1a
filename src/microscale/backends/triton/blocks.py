"""Weights whose codes meet those of activations in a GPU's block-scaled matrix units, and the exact way back.

These units take what `quantize` stores: two 4-bit codes of consecutive columns in a byte, and a scale byte for each
block. So this is the canonical tensor, its rows filled up with zeros to whole groups of 128 columns; where K is such a
multiple, it is the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from microscale.backends.triton import layout
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.quant import QuantTensor
from microscale.scales import E4M3_NAN


@dataclass(frozen=True, eq=False)
class Blocks:
    """What `gemm.product_of_blocks` reads.

    Attributes:
        format, shape, rule: as in the `QuantTensor`, [N, K] or [E, N, K].
        codes: uint8 [E, N, groups * 16 * bits], E = 1 for a matrix.
        scales: uint8 [E, N, groups * 4], NVFP4 groups * 8.
        row_scale, tensor_scale: as in `layout.Packed`.
    """

    format: Format
    shape: tuple[int, ...]
    rule: str | None
    codes: Tensor
    scales: Tensor
    row_scale: Tensor | None
    tensor_scale: Tensor | None

    @property
    def groups(self) -> int:
        """Groups of 128 codes in a row."""
        return -(-self.shape[-1] // layout.GROUP)

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """The kernels' compile-time description of the format, whatever `dtype` is. Do not write to it."""
        return layout.constants(self.format, True, False)

    @cached_property
    def plain(self) -> layout.Packed:
        """For activations that are not multiplied as codes. Kept, so these weights are in memory twice."""
        why = "they were packed for activations that are multiplied as codes, and these are not"
        return layout.pack_again(unpack(self), why)


def pack(w: QuantTensor) -> Blocks:
    """[N, K] or [E, N, K], in MXFP4, MXFP8 or NVFP4. Of NVFP4 waits for the device: it looks at the scales.

    Raises:
        BackendError: a scale of NVFP4 is negative.
    """
    if w.format.scale == "e4m3" and bool((w.scales > E4M3_NAN).any()):
        raise BackendError("a scale is negative, and block-scaled units read scales without a sign")
    experts, (n, k) = (w.shape[0] if len(w.shape) == 3 else 1), w.shape[-2:]
    groups = -(-k // layout.GROUP)
    codes = _filled(w.codes, groups * layout.GROUP * w.format.element.bits // 8)
    scales = _filled(w.scales, groups * (layout.GROUP // w.format.block[1]))
    return Blocks(
        w.format,
        w.shape,
        w.rule,
        codes.view(experts, n, codes.shape[-1]),
        scales.view(experts, n, scales.shape[-1]),
        layout.row_scale(w),
        w.tensor_scale,
    )


def unpack(packed: Blocks) -> QuantTensor:
    """The exact inverse of `pack`."""
    fmt, shape = packed.format, packed.shape
    columns = fmt.packed_columns(shape[-1])
    blocks = fmt.scale_shape(*shape[-2:])[1]
    codes = packed.codes[..., :columns].reshape(*shape[:-1], columns)
    scales = packed.scales[..., :blocks].reshape(*shape[:-1], blocks)
    return QuantTensor(fmt, shape, codes, scales, packed.tensor_scale, packed.rule)


def _filled(t: Tensor, columns: int) -> Tensor:
    """Rows with zeros up to so many columns, contiguous; itself where it is that already."""
    missing = columns - t.shape[-1]
    return (torch.nn.functional.pad(t, (0, missing)) if missing else t).contiguous()
