"""The C++ core: weights decoded in registers, for every format and every level of the CPU's instruction set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microscale import ops
from microscale.activations import Activation
from microscale.backends import autograd, cpu_core, emulation
from microscale.backends.cpu_core import DTYPE_IDS, FORMAT_IDS
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.operands import check_linear, check_moe, stored, stored_apart
from microscale.quant import QuantTensor

REPACKS = True  # see `contract.Contract`


@dataclass(eq=False)
class Packed:
    """Weights in the core's layout, csrc/microscale.h.

    Attributes:
        buffer: uint8, aligned to 64 bytes; empty where the shape holds a 0.
        format, shape: of the canonical tensor, [N, K] or [E, N, K].
        tensor_scale: the canonical one, for `unpack`.
        outer: the same as float32 [E, N], contiguous.
        rule: the canonical tensor's.
    """

    buffer: Tensor
    format: Format
    shape: tuple[int, ...]
    tensor_scale: Tensor | None
    outer: Tensor | None
    rule: str | None


def pack(w: QuantTensor) -> Packed:
    """A copy in tiles of 16 columns x 32 k, codes beside their scales.

    Raises:
        BackendError: not in a format of weights, not [N, K] or [E, N, K], or not on the CPU.
    """
    if w.format.name not in FORMAT_IDS or len(w.shape) not in (2, 3) or w.device.type != "cpu":
        found = f"{w.format.name} {list(w.shape)} on {w.device.type}"
        raise BackendError(f"the C++ core packs [N, K] or [E, N, K] weights on the CPU, not {found}")
    e, n, k = _sizes(w.shape)
    outer = None
    if w.tensor_scale is not None:
        outer = w.tensor_scale.expand(w.shape[:-1]).reshape(e, n).contiguous()
    buffer = cpu_core.pack(w.format.name, (e, n, k), w.codes.contiguous(), w.scales.contiguous())
    return Packed(buffer, w.format, w.shape, w.tensor_scale, outer, w.rule)


def unpack(packed: Packed) -> QuantTensor:
    """What was packed, bit for bit, in new memory."""
    fmt, shape = packed.format, packed.shape
    *lead, n, k = shape
    scale_dtype = torch.float32 if fmt.scale == "f32" else torch.uint8
    with autograd.untransformed():
        codes = torch.empty((*lead, n, fmt.packed_columns(k)), dtype=torch.uint8, device="cpu")
        scales = torch.empty((*lead, *fmt.scale_shape(n, k)), dtype=scale_dtype, device="cpu")
        cpu_core.unpack(packed.buffer, codes, scales)
    return QuantTensor(fmt, shape, codes, scales, packed.tensor_scale, packed.rule)


def linear(x: Tensor, w: Packed, bias: Tensor | None = None, *, act: Format | None = None) -> Tensor:
    """See `contract.Contract.linear`.

    Numerics: float32 accumulation; a row's result depends neither on other rows nor on the number of threads. Stored
    activations are multiplied as the numbers that they stand for, in bfloat16 where that holds them and x, else in
    float32. It holds NVFP4's without their rows' multipliers, which multiply sums.
    """
    check_linear(x, w.shape, bias)
    _check(x)
    product: Callable[..., Tensor] = ops.linear if autograd.recorded() else cpu_core.linear

    def fast(x: Tensor, bias: Tensor | None) -> Tensor:
        if act is None:
            return product(x, w.buffer, w.outer, w.shape[0], bias)
        rows, x_outer = _numbers(x, act)
        return product(rows, w.buffer, w.outer, w.shape[0], bias, x_outer).to(x.dtype)

    def slow(x: Tensor, bias: Tensor | None) -> Tensor:
        return emulation.linear(x, emulation.Packed(unpack(w)), bias, act=act)

    return autograd.run(fast, slow, x, bias)


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
    """See `contract.Contract.moe`.

    Numerics: as `linear`; intermediates and the sum over experts are float32, or rounded once to x's dtype where the
    instructions multiply that. With `act` intermediates are rounded to it from float32.
    """
    check_moe(x, topk_ids, topk_weights, w13.shape, w2.shape, activation, b13, b2, weight_on_input)
    _check(x)
    experts, n, _ = w2.shape
    weights = (w13.buffer, w13.outer, w2.buffer, w2.outer, experts, n)

    def slow(x: Tensor, topk_weights: Tensor, b13: Tensor | None, b2: Tensor | None) -> Tensor:
        return emulation.moe(
            x,
            topk_ids,
            topk_weights,
            emulation.Packed(unpack(w13)),
            emulation.Packed(unpack(w2)),
            activation,
            b13=b13,
            b2=b2,
            expert_map=expert_map,
            weight_on_input=weight_on_input,
            act=act,
        )

    def fast(x: Tensor, topk_weights: Tensor, b13: Tensor | None, b2: Tensor | None) -> Tensor:
        dtype, x_outer = x.dtype, None
        if act is not None:
            if weight_on_input:  # a token has one route, and is rounded with its weight
                x, topk_weights = x.float() * topk_weights.float(), torch.ones_like(topk_weights)
            x, x_outer = _numbers(x, act)
        rest = (b13, b2, expert_map, weight_on_input, "" if act is None else act.name, x_outer)
        if not autograd.recorded():
            return cpu_core.moe(x, topk_ids, topk_weights, *weights, activation, *rest).to(dtype)
        a = activation
        fields = (a.kind, a.gated, a.interleaved, a.alpha, a.beta, a.limit)
        y: Tensor = ops.moe(x, topk_ids, topk_weights, *weights, *fields, *rest)
        return y.to(dtype)

    if 0 in w13.shape or 0 in w2.shape:
        return slow(x, topk_weights, b13, b2)
    return autograd.run(fast, slow, x, topk_weights, b13, b2)


def _numbers(x: Tensor, act: Format) -> tuple[Tensor, Tensor | None]:
    """x as it reads back from `act`: in bfloat16 where that holds it and x, else in float32.

    And what its rows are still to be multiplied by, if anything: NVFP4's multipliers, without which bfloat16 holds it.
    """
    slow = autograd.recorded() or act.name not in cpu_core.STORED_IDS
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and act.scale != "f32" else torch.float32
    if dtype == torch.bfloat16 and act.tensor_scale:
        if slow:
            return stored_apart(x, act, dtype)
        outer = torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")
        return cpu_core.stored(x, act, dtype, outer), outer
    return (stored(x, act, dtype) if slow else cpu_core.stored(x, act, dtype)), None


def _check(x: Tensor) -> None:
    if x.dtype not in DTYPE_IDS:
        raise BackendError(f"the C++ core takes bf16, fp16 and fp32 activations, not {x.dtype}")
    if x.device.type != "cpu":
        raise BackendError(f"the C++ core takes activations on the CPU, not on {x.device}")


def _sizes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(E, N, K); a single matrix is E = 1."""
    e, n, k = shape if len(shape) == 3 else (1, *shape)
    return e, n, k
