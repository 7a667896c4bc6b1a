"""The package vllm-xpu-kernels (Intel GPUs): oneDNN's products of quantised activations, a grouped product for experts.

Linears take activations in the format of the weights. Experts take bf16 ones; those of an MX format are quantised and
multiplied as the bf16 numbers that they stand for, which is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.adapters import calls
from microscale.backends.adapters.operands import as_bf16, check_known, check_readable, quantized_rows
from microscale.backends.adapters.tiles import as_dtype
from microscale.backends.adapters.xpu_kernels_rules import LINEAR, operands
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.quant import QuantTensor

REPACKS = True  # see `contract.Contract`; scales, and the experts' FP8 codes, are transposed

_CODES = {"e2m1": "float4_e2m1fn_x2", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclass(eq=False)
class Packed:
    """Weights as the package multiplies them.

    Attributes:
        codes: the canonical ones; FP8 experts' transposed, [E, K, N].
        scales: transposed, [K / 32, N], [K / 128, N / 128] or [E, K / 32, N]; of MXFP4 experts the canonical ones.
        format, shape, rule: of the canonical tensor.
    """

    codes: Tensor
    scales: Tensor
    format: Format
    shape: tuple[int, ...]
    rule: str | None


def pack(w: QuantTensor) -> Packed:
    """Scales, and FP8 experts' codes, transposed into new memory; other codes as they are.

    Linears' scales are [K / 32, N]: oneDNN reads scales of weights in the order of the weights, and those are [K, N].

    Raises:
        BackendError: weights that the kernels would read as others.
    """
    check_known(w, [weight for weight, _ in LINEAR], "vllm-xpu-kernels")
    check_readable(w, "vllm-xpu-kernels")
    experts = len(w.shape) == 3
    return Packed(
        _turned(w.codes) if experts and w.format.element.bits == 8 else w.codes.contiguous(),
        w.scales.contiguous() if experts and w.format.element.bits == 4 else _turned(w.scales),
        w.format,
        w.shape,
        w.rule,
    )


def unpack(packed: Packed) -> QuantTensor:
    """What was packed, bit for bit."""
    fmt, experts = packed.format, len(packed.shape) == 3
    codes = _turned(packed.codes) if experts and fmt.element.bits == 8 else packed.codes
    scales = packed.scales if experts and fmt.element.bits == 4 else _turned(packed.scales)
    return QuantTensor(fmt, packed.shape, codes, scales, None, packed.rule)


def linear(x: Tensor, w: Packed, bias: Tensor | None = None, *, act: Format | None = None) -> Tensor:
    """See `contract.Contract.linear`. Numerics: float32 sums, rounded once, bias within."""
    if act is None:
        raise BackendError("oneDNN multiplies quantised activations only, and none are asked for")
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
    if x.dtype != torch.bfloat16:
        raise BackendError(f"the grouped product takes bf16 activations here, not {x.dtype}")
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
    import vllm_xpu_kernels._xpu_C  # noqa: F401 (registers the operators)

    assert act is not None
    ops = torch.ops._xpu_C
    a = quantized_rows(x, act)
    a_scales, w_scales = (
        as_dtype(s, "float8_e8m0fnu") if s.dtype == torch.uint8 else s for s in (a.scales, w.scales)
    )
    name = _CODES[w.format.element.name]
    operands = (as_dtype(a.codes.contiguous(), name), as_dtype(w.codes, name).t())
    scales = (a_scales.contiguous(), w_scales)
    bias = None if bias is None else bias.contiguous()
    y: Tensor
    if w.format.element.bits == 4:
        y = ops.fp4_gemm(*operands, *scales, x.dtype, bias)
    else:
        y = ops.fp8_gemm(*operands, x.dtype, *scales, bias)
    return y


def _grouped(rows: Tensor, w: Packed, offsets: Tensor, bias: Tensor | None, act: Format | None) -> Tensor:
    import vllm_xpu_kernels._xpu_C  # noqa: F401 (registers the operators)

    experts, n, k = w.shape
    out = torch.empty(rows.shape[0], n, dtype=torch.bfloat16, device=rows.device)
    torch.ops._xpu_C.cutlass_grouped_gemm_interface(
        ptr_A=as_bf16(rows, act),
        ptr_A_scale=None,
        ptr_B=as_dtype(w.codes, _CODES[w.format.element.name]),
        ptr_B_scale=w.scales,
        # Read as bf16 whatever it is.
        ptr_bias=None
        if bias is None
        else calls.exactly(bias, torch.bfloat16, "the grouped product").contiguous(),
        ptr_D=out,
        rows_per_expert=offsets.diff().to(torch.int32),
        N=n,
        K=k,
        num_experts=experts,
    )
    return out


def _turned(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous()
