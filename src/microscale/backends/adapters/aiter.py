"""AMD's package amd-aiter (gfx950): its Triton products of MXFP4 or block FP8 activations and weights.

Their results are written as float32, so that biases are added before anything is rounded. Experts are one product each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.adapters import calls
from microscale.backends.adapters.aiter_rules import PAIRS, operands
from microscale.backends.adapters.operands import check_known, check_readable, quantized_rows
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.quant import QuantTensor

REPACKS = True  # see `contract.Contract`; codes are aliases, MXFP4's scales have wider rows

# The MXFP4 kernel reads scales up to the end of its last tile of K, whatever K is, and a NaN there would count: rows
# of scales are as wide as its largest tile, and filled up with ones.
_TILE, _ONE = 1024, 127


@dataclass(eq=False)
class Packed:
    """Weights as aiter multiplies them.

    Attributes:
        codes: the canonical ones.
        scales: a view of the canonical shape; of MXFP4 into wider rows.
        format, shape, rule: of the canonical tensor.
    """

    codes: Tensor
    scales: Tensor
    format: Format
    shape: tuple[int, ...]
    rule: str | None

    def expert(self, e: int) -> Packed:
        """One matrix of [E, N, K], as views."""
        return replace(self, codes=self.codes[e], scales=self.scales[e], shape=self.shape[1:])


def pack(w: QuantTensor) -> Packed:
    """Codes as they are; MXFP4's scales in wider rows.

    Raises:
        BackendError: weights whose NaNs the kernels may lose.
    """
    check_known(w, [weight for weight, _ in PAIRS], "aiter")
    check_readable(w, "aiter")
    scales = _wide(w.scales) if w.format.scale == "e8m0" else w.scales.contiguous()
    return Packed(w.codes.contiguous(), scales, w.format, w.shape, w.rule)


def unpack(packed: Packed) -> QuantTensor:
    """What was packed, bit for bit; the codes are the very ones."""
    scales = packed.scales.contiguous()
    return QuantTensor(packed.format, packed.shape, packed.codes, scales, None, packed.rule)


def linear(x: Tensor, w: Packed, bias: Tensor | None = None, *, act: Format | None = None) -> Tensor:
    """See `contract.Contract.linear`. Numerics: float32 sums, also across splits of K; rounded once."""
    _check(act)
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
    """See `contract.Contract.moe` and, for the numerics, `calls.moe`. One product for each expert that is routed to."""
    _check(act)
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
    )


def _product(x: Tensor, w: Packed, bias: Tensor | None, act: Format | None) -> Tensor:
    assert act is not None
    a = quantized_rows(x, act)
    codes = a.codes.contiguous()
    y = torch.empty(x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
    if w.format.name == "mxfp4":
        from aiter.ops.triton.gemm_afp4wfp4 import gemm_afp4wfp4

        gemm_afp4wfp4(codes, w.codes, _wide(a.scales), w.scales, torch.float32, y)
    else:
        from aiter.ops.triton.gemm_a8w8_blockscale import gemm_a8w8_blockscale

        e4m3 = torch.float8_e4m3fn
        scales = (a.scales.contiguous(), w.scales)
        gemm_a8w8_blockscale(codes.view(e4m3), w.codes.view(e4m3), *scales, torch.float32, y)
    return y if bias is None else y + bias.float()


def _wide(scales: Tensor) -> Tensor:
    """The same scales [..., rows, K / 32] as a view into rows as wide as whole tiles."""
    groups = scales.shape[-1]
    return torch.nn.functional.pad(scales, (0, -groups % (_TILE // 32)), value=_ONE)[..., :groups]


def _check(act: Format | None) -> None:
    if act is None:
        raise BackendError("this adapter multiplies quantised activations only, and none are asked for")
