"""What goes into another package's product: activations quantised row by row, and weights that it can read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from microscale.errors import BackendError
from microscale.formats import Format
from microscale.operands import stored
from microscale.quant import QuantTensor, quantize


def quantized_rows(x: Tensor, act: Format) -> QuantTensor:
    """x [M, K] in `act`, each row on its own, as `operands.stored` reads it: NVFP4's tensor scale is [M]."""
    q = quantize(x[:, None, :].float(), act)  # a row as a matrix of its own
    outer = None if q.tensor_scale is None else q.tensor_scale[:, 0]
    shape = (x.shape[0], x.shape[1])
    return replace(q, shape=shape, codes=q.codes[:, 0], scales=q.scales[:, 0], tensor_scale=outer)


def as_bf16(x: Tensor, act: Format | None) -> Tensor:
    """x [R, K] as it goes into a bf16 product: itself, or the numbers that it reads back as from `act`.

    A number in an MX format has 8 significant bits or fewer, so the product is that of the quantised activations,
    exactly (below 2^-126 what bf16 cannot hold is rounded).

    Raises:
        BackendError: scales of `act` are not powers of two.
    """
    if act is not None and act.scale != "e8m0":
        raise BackendError(f"numbers in {act.name} have more bits than bf16 holds")
    return stored(x, act, torch.bfloat16)


def check_known(w: QuantTensor, formats: Collection[str], who: str) -> None:
    """Weights in a format that an adapter packs.

    Raises:
        BackendError: another one.
    """
    if w.format.name not in formats:
        raise BackendError(f"{who} has no kernel here for weights in {w.format.name}")


def padded(t: Tensor, rows: int, columns: int = 1) -> Tensor:
    """t [..., R, C] with zeros added, up to multiples of `rows` and `columns`; itself where it has such sizes."""
    down, right = -t.shape[-2] % rows, -t.shape[-1] % columns
    return torch.nn.functional.pad(t, (0, right, 0, down)) if down or right else t


def one_tensor_scale(w: QuantTensor, who: str) -> Tensor:
    """NVFP4's tensor scale as float32 [E], or [1] of a single matrix.

    Raises:
        BackendError: rows of one matrix have different ones, which `who` has no argument for.
    """
    assert w.tensor_scale is not None
    outer = w.tensor_scale.expand(w.shape[:-1])
    first = outer[..., :1]
    if not torch.equal(first.expand(outer.shape), outer):
        raise BackendError(f"{who} takes one tensor scale for each matrix, and rows of these differ")
    return first.reshape(-1).contiguous()


def check_readable(w: QuantTensor, who: str, shift: int = 0) -> None:
    """Weights that a kernel of 16-bit numbers decodes: all finite, and each a normal bfloat16 or zero.

    Args:
        shift: powers of two below their values that the kernel holds them at.
    Raises:
        BackendError: a NaN or infinite scale or element, or one whose product with its scale leaves bfloat16's range,
            which kernels that shift exponents get wrong without a word. Waits for the device.
    """
    scales, element = w.scales, w.format.element
    if w.format.scale == "f32":
        strange = ~torch.isfinite(scales)
    elif w.format.scale == "e4m3":
        strange = (scales & 0x7F) == 0x7F
    else:
        strange = scales == 255
    if bool(strange.any()):
        raise BackendError(f"a scale is NaN or infinite, and {who} does not carry that into the result")
    if element.bits == 8:
        specials = 0x7C if element.ieee_specials else element.nan_code
        if specials is not None and bool(((w.codes & specials) == specials).any()):
            raise BackendError(f"a weight is NaN or infinite, and {who} does not carry that into the result")
    if w.format.scale == "e8m0":
        low, high = 1 + element.mantissa_bits - element.emin + shift, 254 - element.emax
        outside = (scales < low) | (scales > high)
        if bool(outside.any()) and bool((_used_blocks(w) & outside).any()):
            raise BackendError(
                f"a scale byte is outside {low} .. {high}, so its weights are no normal bfloat16 numbers"
            )


def _used_blocks(w: QuantTensor) -> Tensor:
    """Which blocks have a byte that is not zero; shape of the scales. Rows are whole blocks."""
    blocks = max(w.scales.shape[-1], 1)
    return w.codes.reshape(*w.scales.shape, w.codes.shape[-1] // blocks).any(dim=-1)
