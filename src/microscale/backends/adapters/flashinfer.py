"""The package flashinfer-python (NVIDIA Blackwell): products of quantised activations on block-scaled tensor cores.

Linears take activations in the format of the weights; MXFP4 experts take MXFP8 ones too, all in one grouped product.
NVFP4 uses the one kernel with a scale for each token, since each token has a tensor scale of its own here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.adapters import calls
from microscale.backends.adapters.flashinfer_rules import PAIRS, operands
from microscale.backends.adapters.operands import check_known, one_tensor_scale, padded, quantized_rows
from microscale.backends.adapters.tiles import tiled, untiled
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.quant import QuantTensor

REPACKS = True  # see `contract.Contract`

_K = 128  # columns are padded to this many: whole tiles of scales
_ROWS = 4  # an expert's rows begin at multiples of this
_TILE = 128  # an expert's scales begin at multiples of this many rows


@dataclass(eq=False)
class Packed:
    """Weights as FlashInfer multiplies them.

    Attributes:
        codes: [E,] N, bytes, columns padded with zeros to a multiple of 128.
        tiles: scales, [E,] bytes; see `tiles`.
        outer: NVFP4's tensor scale, float32 [E] or [1].
        format, shape, tensor_scale, rule: of the canonical tensor.
    """

    codes: Tensor
    tiles: Tensor
    outer: Tensor | None
    format: Format
    shape: tuple[int, ...]
    tensor_scale: Tensor | None
    rule: str | None

    @property
    def columns(self) -> int:
        """K with its padding."""
        return -(-self.shape[-1] // _K) * _K

    def expert(self, e: int) -> Packed:
        """One matrix of [E, N, K], as views."""
        outer = None if self.outer is None else self.outer[e : e + 1]
        return replace(self, codes=self.codes[e], tiles=self.tiles[e], outer=outer, shape=self.shape[1:])


def pack(w: QuantTensor) -> Packed:
    """Scales in tiles; codes as they are where K is a multiple of 128.

    Raises:
        BackendError: rows of one NVFP4 matrix have different tensor scales.
    """
    check_known(w, [weight for weight, _ in PAIRS], "FlashInfer")
    fmt = w.format
    codes = padded(w.codes.contiguous(), 1, _K * fmt.element.bits // 8)
    scales = padded(w.scales, 1, _K // fmt.block[1])
    outer = one_tensor_scale(w, "FlashInfer") if fmt.tensor_scale else None
    return Packed(codes, tiled(scales), outer, fmt, w.shape, w.tensor_scale, w.rule)


def unpack(packed: Packed) -> QuantTensor:
    """What was packed, bit for bit."""
    fmt, (*_, n, k) = packed.format, packed.shape
    codes = packed.codes[..., : fmt.packed_columns(k)].contiguous()
    groups = packed.columns // fmt.block[1]
    scales = untiled(packed.tiles, n, groups)[..., : fmt.scale_shape(n, k)[1]].contiguous()
    return QuantTensor(fmt, packed.shape, codes, scales, packed.tensor_scale, packed.rule)


def linear(x: Tensor, w: Packed, bias: Tensor | None = None, *, act: Format | None = None) -> Tensor:
    """See `contract.Contract.linear`. Numerics: the tensor cores' float32 sums, rounded once."""
    _check(act, bias)
    return calls.linear(x, w, bias, act, _product, unpack, operands)


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
    """See `contract.Contract.moe` and, for the numerics, `calls.moe`."""
    _check(act, b13, b2)
    assert act is not None
    together = w13.format.name == "mxfp4" and act.element.bits == 8
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
        grouped=_grouped if together else calls.one_by_one(_product, Packed.expert),
        unpack=unpack,
        operands=operands,
    )


def _product(x: Tensor, w: Packed, bias: Tensor | None, act: Format | None) -> Tensor:
    from flashinfer.gemm import mm_fp4, mm_mxfp8

    assert act is not None
    a = quantized_rows(padded(x, 1, _K), act)
    dtype = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    a_tiles, codes = tiled(a.scales), a.codes.contiguous()
    y: Tensor
    if act.element.bits == 8:
        e4m3 = torch.float8_e4m3fn
        y = mm_mxfp8(codes.view(e4m3), w.codes.view(e4m3).t(), a_tiles, w.tiles, out_dtype=dtype)
        return y
    groups = w.columns // act.block[1]
    scales = (a_tiles.view(-1, groups), w.tiles.view(-1, groups).t())
    if w.outer is None or a.tensor_scale is None:
        options = {"block_size": 32, "use_nvfp4": False}
        y = mm_fp4(codes, w.codes.t(), *scales, out_dtype=dtype, backend="auto", **options)
    else:
        y = mm_fp4(
            codes, w.codes.t(), *scales, a.tensor_scale * w.outer, dtype, block_size=16, backend="cute-dsl"
        )
    return y


def _grouped(rows: Tensor, w: Packed, offsets: Tensor, bias: Tensor | None, act: Format | None) -> Tensor:
    """All experts' MXFP8 rows x MXFP4 weights at once.

    An expert's rows begin at a multiple of 4, and its scales, e experts after the first, at the multiple of 128 that
    floor((row + 127 e) / 128) gives.
    """
    from flashinfer.gemm import group_gemm_mxfp8_mxfp4_nt_groupwise

    assert act is not None
    a = quantized_rows(padded(rows, 1, _K), act)
    counts = offsets.diff()
    starts = torch.nn.functional.pad(((counts + _ROWS - 1) // _ROWS * _ROWS).cumsum(0), (1, 0))
    index = torch.arange(counts.numel() + 1, device=rows.device)
    scale_starts = (starts + index * (_TILE - 1)) // _TILE * _TILE
    expert = torch.repeat_interleave(index[:-1], counts)
    within = torch.arange(rows.shape[0], device=rows.device) - offsets[expert]
    place, total = starts[expert] + within, int(starts[-1])
    codes = a.codes.new_zeros(total, a.codes.shape[1])
    codes[place] = a.codes
    scales = a.scales.new_zeros(int(scale_starts[-1]), a.scales.shape[1])
    scales[scale_starts[expert] + within] = a.scales
    groups = w.columns // 32
    # swap_ab=False: the form whose test in FlashInfer covers SM120 too; both forms have the same tiles.
    y: Tensor = group_gemm_mxfp8_mxfp4_nt_groupwise(
        codes.view(torch.float8_e4m3fn if act.element.name == "e4m3" else torch.float8_e5m2),
        w.codes,
        tiled(scales).view(-1, groups),
        w.tiles.view(w.shape[0], -1, groups),
        starts.to(torch.int32),
        swap_ab=False,
        out_dtype=torch.bfloat16,
    )
    return y[place]


def _check(act: Format | None, *biases: Tensor | None) -> None:
    if act is None:
        raise BackendError("this adapter multiplies quantised activations only, and none are asked for")
    if any(b is not None for b in biases):
        raise BackendError("FlashInfer's products round to 16 bits before a bias could be added")
