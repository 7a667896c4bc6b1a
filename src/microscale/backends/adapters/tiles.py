"""Block scales in the tiles that Blackwell's tensor cores read: 128 rows x 4 scales, as 32 x 16 bytes.

Scale [m, g] of a tile lies at byte (m % 32) * 16 + (m // 32) * 4 + g; tiles follow each other along g, then along m.
Rows are padded to 128 and scales to 4, with zeros.

Source: PTX ISA, "Matrix multiply and accumulate with block scaling"; cuBLAS documentation, 3.1.5.2, "1D block scaling
factors layout"; torch calls it SWIZZLE_32_4_4, FlashInfer 128x4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from microscale.backends.adapters.operands import padded


def tiled(scales: Tensor) -> Tensor:
    """Bytes [..., M, G] -> [..., ceil(M / 128) * 128 * ceil(G / 4) * 4]."""
    whole = padded(scales, 128, 4)
    lead = whole.shape[:-2]
    m, g = whole.shape[-2:]
    split = whole.reshape(*lead, m // 128, 4, 32, g // 4, 4)
    d = len(lead)
    return split.permute(*range(d), d, d + 3, d + 2, d + 1, d + 4).reshape(*lead, m * g)


def untiled(tiles: Tensor, m: int, g: int) -> Tensor:
    """The exact inverse: [..., bytes] -> [..., m, g]."""
    lead = tiles.shape[:-1]
    rows, columns = -(-m // 128), -(-g // 4)
    split = tiles.reshape(*lead, rows, columns, 32, 4, 4)
    d = len(lead)
    whole = split.permute(*range(d), d, d + 3, d + 2, d + 1, d + 4).reshape(*lead, rows * 128, columns * 4)
    return whole[..., :m, :g].contiguous()


def as_dtype(t: Tensor, name: str) -> Tensor:
    """A view of bytes in a dtype of torch's that older versions lack; by name, so that importing does not fail."""
    dtype: torch.dtype = getattr(torch, name)
    return t.view(dtype)
