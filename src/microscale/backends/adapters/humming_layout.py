"""humming's order of codes and scales, read backwards: its package packs, and only this file can unpack.

Weights for 16-bit activations lie in tiles of 64 rows x 16 columns, a word sequence for each of 32 threads. Thread t
holds rows t // 4 and columns t % 4 of each 8 x 8 square, two neighbouring columns at a time; words hold codes in lanes
of 4 or 8 bits, the even columns of two squares first unless the hardware converts natively. Six-bit codes lie in lanes
of 8, four lanes' spare bits filled with the last of three words' neighbours.

Source: humming-kernels 0.1.19, include/humming/kernel/process.cuh (weight_repack_nk) and transform.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def codes(weight: Tensor, bits: int, n: int, k: int, native: bool) -> Tensor:
    """int32 [K' / 16, N' * bits / 2] -> one code a byte, uint8 [n, k]; N' and K' are n and k with their padding.

    Args:
        native: `LayerConfig.use_native_dequant`: lanes in plain order.
    """
    slices, width = weight.shape
    tiles = width * 2 // bits // 64
    words = weight.contiguous().view(torch.uint8).view(slices, tiles, 32, bits * 4)
    lanes = _lanes(words, bits)  # [slices, tiles, 32, words, lanes of a word]
    if not native:
        # Lane j of a word holds value (j % half) * 2 + j // half.
        half = lanes.shape[-1] // 2
        lanes = lanes.unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)
    values = lanes.reshape(slices, tiles, 8, 4, 4, 2, 2, 2)  # slice, tile, t / 4, t % 4, n16, n8, k8, k1
    whole = values.permute(1, 4, 5, 2, 0, 6, 3, 7).reshape(tiles * 64, slices * 16)
    return whole[:n, :k]


def scales(t: Tensor, n: int, groups: int) -> Tensor:
    """[G', N'] -> [n, groups]: every 64 rows are an 8 x 8 square, transposed."""
    t = t.reshape(t.shape[0], -1, 8, 8).transpose(-1, -2).reshape(t.shape)
    return t.T[:n, :groups].contiguous()


def _lanes(words: Tensor, bits: int) -> Tensor:
    """Bytes [..., bits * 4] -> lanes [..., words, lanes of a word], each holding one code."""
    lead = words.shape[:-1]
    if bits == 8:
        return words.view(*lead, 8, 4)
    if bits == 4:
        return torch.stack((words & 15, words >> 4), dim=-1).view(*lead, 4, 8)
    o0, o1, o2 = words.view(*lead, 2, 3, 4).unbind(-2)
    four = (o0 & 63, o0 >> 2 & 48 | o1 & 15, o1 >> 2 & 60 | o2 & 3, o2 >> 2 & 63)
    return torch.stack(four, dim=-2).flatten(-3, -2)
