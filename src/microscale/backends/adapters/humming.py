"""The package humming-kernels (NVIDIA, sm_80 and newer): weights decoded in registers, activations in bf16.

Activations of an MX format are quantised and multiplied as the bf16 numbers that they stand for, which is exact.

Its kernels are asked to be batch-invariant: the others add up partial sums of K in bf16, which is coarser than one
rounding. Biases are not given to it: it adds them to what is already rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.adapters import calls, humming_layout
from microscale.backends.adapters.humming_rules import FORMATS, operands
from microscale.backends.adapters.operands import as_bf16, check_known, check_readable, one_tensor_scale
from microscale.backends.adapters.tiles import as_dtype
from microscale.elements import pack_codes
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.quant import QuantTensor

REPACKS = True  # see `contract.Contract`

_ELEMENTS = {
    "e2m1": "float4e2m1",
    "e2m3": "float6e2m3",
    "e3m2": "float6e3m2",
    "e4m3": "float8e4m3",
    "e5m2": "float8e5m2",
}
_SCALES = {"e8m0": "float8e8m0", "e4m3": "float8e4m3"}
_SCALE_VIEWS = {"e8m0": "float8_e8m0fnu", "e4m3": "float8_e4m3fn"}
# Its kernels hold weights up to this many powers of two below their values, and scale the result back.
_SHIFT = 4
# Padding inside the packed form: rows and columns that every kernel of the package divides into its tiles.
PAD_N, PAD_K = 256, 128


@dataclass(eq=False)
class Packed:
    """Weights in humming's layout.

    Attributes:
        config: the package's `LayerConfig`, without a bias.
        tensors: what its kernels read: "weight", "weight_scale" and, of NVFP4, "weight_scale_2".
        format, shape, tensor_scale, rule: of the canonical tensor.
    """

    config: Any
    tensors: dict[str, Tensor]
    format: Format
    shape: tuple[int, ...]
    tensor_scale: Tensor | None
    rule: str | None


def pack(w: QuantTensor) -> Packed:
    """A copy in the package's layout, made by the package and read back at once: one that differs is not used.

    Raises:
        BackendError: weights that its kernels would read as others, or a layout that is not the one that was read.
    """
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_and_transform_humming_tensors

    check_known(w, FORMATS, "humming")
    check_readable(w, "humming", _SHIFT)
    fmt = w.format
    *lead, n, k = w.shape
    if n % 8 or k % 32:
        raise BackendError(f"humming packs N by 8 and K by 32, and these weights are {tuple(w.shape)}")
    schema = HummingWeightSchema(
        b_dtype=_ELEMENTS[fmt.element.name],
        bs_dtype=_SCALES[fmt.scale],
        weight_scale_group_size=fmt.block[1],
        weight_scale_2_type="tensor" if fmt.tensor_scale else None,
    )
    tensors = {
        "weight": _words(w.codes),
        "weight_scale": as_dtype(w.scales.contiguous(), _SCALE_VIEWS[fmt.scale]),
    }
    if fmt.tensor_scale:
        tensors["weight_scale_2"] = one_tensor_scale(w, "humming")
    config, tensors = prepare_and_transform_humming_tensors(
        tensors,
        n,
        k,
        schema,
        num_experts=lead[0] if lead else None,
        pad_n_to_multiple=PAD_N,
        pad_k_to_multiple=PAD_K,
        torch_dtype=torch.bfloat16,
        device=w.device,
    )
    packed = Packed(config, tensors, fmt, w.shape, w.tensor_scale, w.rule)
    back = unpack(packed)
    if not (torch.equal(back.codes, w.codes) and torch.equal(back.scales, w.scales)):
        raise BackendError("humming packed the weights in another layout than the one that was read")
    return packed


def unpack(packed: Packed) -> QuantTensor:
    """What was packed, bit for bit, in new memory."""
    fmt, shape = packed.format, packed.shape
    *lead, n, k = shape
    groups = fmt.scale_shape(n, k)
    weight, scale = packed.tensors["weight"], packed.tensors["weight_scale"].view(torch.uint8)
    native, bits = packed.config.use_native_dequant, fmt.element.bits
    codes, scales = [], []
    for e in range(lead[0]) if lead else [None]:
        one, its = (weight, scale) if e is None else (weight[e], scale[e])
        codes.append(pack_codes(humming_layout.codes(one, bits, n, k, native), bits))
        scales.append(humming_layout.scales(its, *groups))
    c, s = (torch.stack(parts) if lead else parts[0] for parts in (codes, scales))
    return QuantTensor(fmt, shape, c, s, packed.tensor_scale, packed.rule)


def linear(x: Tensor, w: Packed, bias: Tensor | None = None, *, act: Format | None = None) -> Tensor:
    """See `contract.Contract.linear`. Numerics: float32 accumulation; a row's result depends on no other row."""
    _check(x, bias)
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
    _check(x, b13, b2)
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
        grouped=_grouped,
        unpack=unpack,
        operands=operands,
    )


def _product(x: Tensor, w: Packed, bias: Tensor | None, act: Format | None) -> Tensor:
    return _forward(as_bf16(x, act), w, "dense")


def _grouped(rows: Tensor, w: Packed, offsets: Tensor, bias: Tensor | None, act: Format | None) -> Tensor:
    return _forward(as_bf16(rows, act), w, "grouped_contiguous", expert_layout=offsets)


def _forward(x: Tensor, w: Packed, kind: str, **options: Any) -> Tensor:
    from humming.forward import humming_forward
    from humming.tune import get_heuristics_config

    how = {"gemm_type": kind, "use_batch_invariant": True}
    # For these rows alone: without it the package compiles its kernels for every number of rows at the first call.
    tuned = get_heuristics_config(w.config, shape_m=x.shape[0], device=x.device, **how)
    y: Tensor = humming_forward(
        w.config, inputs=x, **w.tensors, compute_config=how, tuning_config=tuned, **options
    )
    return y


def _words(codes: Tensor) -> Tensor:
    """Bytes as int32 words, which must begin at a multiple of 4."""
    codes = codes.contiguous()
    return (codes.clone() if codes.data_ptr() % 4 else codes).view(torch.int32)


def _check(x: Tensor, *biases: Tensor | None) -> None:
    if x.dtype != torch.bfloat16:
        raise BackendError(f"humming's weights are packed for bf16 activations, not {x.dtype}")
    if any(b is not None for b in biases):
        raise BackendError("humming adds biases to results that are already rounded to bf16")
