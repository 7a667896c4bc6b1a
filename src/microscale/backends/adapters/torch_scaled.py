"""torch's own block-scaled product, `torch.nn.functional.scaled_mm`: activations in the format of the weights.

Block FP8 on Hopper, MXFP8, NVFP4 and MXFP4 on Blackwell, block FP8 and NVFP4 on Intel GPUs. The result comes in float32
(MXFP4's: in bf16), so that biases and NVFP4's outer scales, one for each token, are applied before it is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.adapters import calls
from microscale.backends.adapters.operands import padded, quantized_rows
from microscale.backends.adapters.tiles import as_dtype, tiled, untiled
from microscale.backends.adapters.torch_scaled_rules import operands
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.quant import QuantTensor

REPACKS = True  # see `contract.Contract`; codes are aliases, and scales have another order

_CODES = {"e4m3": "float8_e4m3fn", "e2m1": "float4_e2m1fn_x2"}
_SCALES = {"e8m0": "float8_e8m0fnu", "e4m3": "float8_e4m3fn"}
# (scale recipe of the activations, of the weights), by the weights' format.
_RECIPES = {
    "fp8_block128": ("BlockWise1x128", "BlockWise128x128"),
    "mxfp8_e4m3": ("BlockWise1x32", "BlockWise1x32"),
    "mxfp4": ("BlockWise1x32", "BlockWise1x32"),
    "nvfp4": ("BlockWise1x16", "BlockWise1x16"),
}
# Tokens are padded to this many: cuBLAS wants aligned columns of their scales.
_ROWS = 16


@dataclass(eq=False)
class Packed:
    """Weights as torch multiplies them.

    Attributes:
        codes: the canonical ones.
        scales: [E,] bytes in tiles (see `tiles`); float32 ones [E,] N / 128, K / 128 padded to 4; on XPU the canonical
            ones.
        format, shape, tensor_scale, rule: of the canonical tensor.
    """

    codes: Tensor
    scales: Tensor
    format: Format
    shape: tuple[int, ...]
    tensor_scale: Tensor | None
    rule: str | None

    def expert(self, e: int) -> Packed:
        """One matrix of [E, N, K], as views."""
        outer = None if self.tensor_scale is None else self.tensor_scale.expand(self.shape[:-1])[e]
        shape = self.shape[1:]
        return replace(self, shape=shape, codes=self.codes[e], scales=self.scales[e], tensor_scale=outer)


def pack(w: QuantTensor) -> Packed:
    """Codes as they are, scales in the order of the device.

    Raises:
        BackendError: a format that torch has no product for.
    """
    if w.format.name not in _RECIPES:
        raise BackendError(f"torch has no block-scaled product for weights in {w.format.name}")
    scales = w.scales.contiguous()
    if not _plain(w.device):
        scales = padded(scales, 1, 4) if w.format.scale == "f32" else tiled(scales)
    return Packed(w.codes.contiguous(), scales, w.format, w.shape, w.tensor_scale, w.rule)


def unpack(packed: Packed) -> QuantTensor:
    """What was packed, bit for bit; the codes are the very ones."""
    n, groups = packed.format.scale_shape(*packed.shape[-2:])
    scales = packed.scales
    if not _plain(scales.device):
        whole = packed.format.scale == "f32"
        scales = scales[..., :groups].contiguous() if whole else untiled(scales, n, groups)
    return QuantTensor(packed.format, packed.shape, packed.codes, scales, packed.tensor_scale, packed.rule)


def linear(x: Tensor, w: Packed, bias: Tensor | None = None, *, act: Format | None = None) -> Tensor:
    """See `contract.Contract.linear`. Numerics: the hardware's sums, see `torch_scaled_rules.accumulation`."""
    _check(x, act)
    return calls.linear(x, w, bias, act, _product, unpack, operands, _kind(x.device))


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Packed,
    w2: Packed,
    activation: Activation,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    expert_map: Tensor | None = None,
    weight_on_input: bool = False,
    act: Format | None = None,
) -> Tensor:
    """See `contract.Contract.moe` and, for the numerics, `calls.moe`. One product for each expert that is routed to."""
    _check(x, act)
    return calls.moe(
        x,
        topk_ids,
        topk_weights,
        w13,
        w2,
        activation,
        b13=b13,
        b2=b2,
        expert_map=expert_map,
        weight_on_input=weight_on_input,
        act=act,
        grouped=calls.one_by_one(_product, Packed.expert),
        unpack=unpack,
        operands=operands,
        device=_kind(x.device),
    )


def _product(x: Tensor, w: Packed, bias: Tensor | None, act: Format | None) -> Tensor:
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    assert act is not None
    m = x.shape[0]
    codes, scale_a, outer = _rows(x, act)
    final = x.dtype == torch.bfloat16 and bias is None and outer is None  # nothing comes before the rounding
    recipe_a, recipe_b = (getattr(ScalingType, name) for name in _RECIPES[w.format.name])
    swizzled = w.format.scale != "f32" and not _plain(x.device)
    swizzle = SwizzleType.SWIZZLE_32_4_4 if swizzled else SwizzleType.NO_SWIZZLE
    y = scaled_mm(
        as_dtype(codes, _CODES[act.element.name]),
        as_dtype(w.codes, _CODES[w.format.element.name]).t(),
        scale_a,
        recipe_a,
        _scale_b(w),
        recipe_b,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=torch.bfloat16 if w.format.name == "mxfp4" or final else torch.float32,
    )
    if outer is not None and w.tensor_scale is not None:
        # Row by row and column by column; torch's own argument is one number for the whole product.
        y = y * outer[:, None] * w.tensor_scale.expand(w.shape[0])
    y = y[:m]
    return y if bias is None else y + bias.float()


def _rows(x: Tensor, act: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [M, K] as codes, scales in the order of the device, and outer scales, of tokens up to a multiple of `_ROWS`."""
    if act.scale == "f32" and x.is_cuda and _triton_rounds():
        from microscale.backends.triton.rounded import codes_of  # one kernel, and the same bits

        return *codes_of(x, act, by_column=True, rows=_ROWS), None
    a = quantized_rows(padded(x, _ROWS), act)
    return a.codes.contiguous(), _scale_a(a), a.tensor_scale


@cache
def _triton_rounds() -> bool:
    return torch.version.hip is None and find_spec("triton") is not None


def _plain(device: torch.device) -> bool:
    """Whether scales are read in the canonical order: oneDNN's way, which Intel GPUs multiply with."""
    return device.type == "xpu"


def _kind(device: torch.device) -> str:
    return "xpu" if _plain(device) else "cuda"


def _scale_a(a: QuantTensor) -> Tensor:
    scales = a.scales.contiguous()
    if a.format.scale == "f32":
        # [M, K / 128] with the tokens of a block side by side.
        return scales if _plain(a.device) else scales.t().contiguous().t()
    return as_dtype(scales if _plain(a.device) else tiled(scales), _SCALES[a.format.scale])


def _scale_b(w: Packed) -> Tensor:
    if w.format.scale == "f32":
        # [K / 128, N / 128]: the columns of a row side by side, every row padded to 16 bytes.
        return w.scales.t().contiguous() if _plain(w.scales.device) else w.scales.t()
    return as_dtype(w.scales, _SCALES[w.format.scale])


def _check(x: Tensor, act: Format | None) -> None:
    if act is None:
        raise BackendError("torch multiplies quantised activations only, and none are asked for")
