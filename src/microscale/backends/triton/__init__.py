"""One source of kernels for CUDA, ROCm and XPU: every format, exact in the weights, activations in 16 or 32 bits.

`layout` packs and unpacks, `decode` turns codes and scales into numbers in registers, `rounded` stores activations in a
format, `blocks` packs for units that multiply codes with their scales, `gemm` has the loop over K and linear, `moe` the
experts, `routing` sorts their routes, `total` adds up their shares, `tiles` has the sizes. Hopper has a layout and
kernels of its own: `placement` and `fragments`, `hopper` and `hopper_moe` over `hopper_loop` or, for many tokens,
`hopper_bulk`, for a single one's experts `hopper_few`, all over `hopper_decode`; `hopper_routes` says whose a tile is,
`hopper_token` has a single one's chosen by its logits, `hopper_results` ends experts, `hopper_fetch` asks for weights
ahead, `cuts` chooses their sizes, and `fallback` takes over if they do not compile.
In CUDA C++, which `hopper_text` writes and `nvrtc` compiles, experts have `hopper_rings` for a few tokens,
`hopper_wide` for many and `hopper_fp8` for FP8 codes on both sides, and linears `hopper_linear`; `hopper_experts` takes
the kernels that a call's cuts are of.
For a decoded token there are `attend` over `spans`, `rows` for products with plain weights, `router`, `small`, and
`likeliest`, the last two of which choose by `keys`.
"""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends import autograd, emulation
from microscale.backends.triton import blocks, cuts, fragments, gemm, layout, tiles
from microscale.backends.triton import moe as experts
from microscale.backends.triton.blocks import Blocks
from microscale.backends.triton.fallback import attempt
from microscale.backends.triton.fragments import Fragments
from microscale.backends.triton.layout import Packed
from microscale.backends.triton.rounded import rows_of
from microscale.backends.triton.small import Choice
from microscale.backends.triton_rules import refuse_pair
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.operands import check_linear, check_moe
from microscale.quant import QuantTensor

__all__ = ["REPACKS", "Packed", "linear", "moe", "pack", "pack_for", "shares", "unpack"]

REPACKS = True  # see `contract.Contract`
Weights: TypeAlias = Packed | Fragments | Blocks
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pack(w: QuantTensor) -> Packed | Fragments:
    """See `contract.Contract.pack`. Waits for the device: it looks at the scales."""
    if tiles.target(w.device).hopper and fragments.suits(w):
        return fragments.pack(w)
    return layout.pack(w)


def pack_for(w: QuantTensor, act: Format | None) -> Weights:
    """See `contract.Contract`. Hopper's own kernels have 16-bit activations: those of MX formats are such numbers in a
    linear, but between two products of experts nothing rounds to them."""
    if tiles.target(w.device).multiplies(w.format, act):
        return blocks.pack(w)
    if act is None or (act.scale == "e8m0" and len(w.shape) == 2):
        return pack(w)
    return layout.pack(w)


def unpack(packed: Weights) -> QuantTensor:
    """The exact inverse of `pack`."""
    if isinstance(packed, Blocks):
        return blocks.unpack(packed)
    return fragments.unpack(packed) if isinstance(packed, Fragments) else layout.unpack(packed)


def _read(w: Weights, act: Format | None) -> Packed | Blocks:
    """What the kernels for every target read beside such activations."""
    return w if isinstance(w, Packed) or (isinstance(w, Blocks) and _are_codes(w, act)) else w.plain


def _are_codes(w: Weights, act: Format | None) -> bool:
    """Whether activations meet these weights as codes in block-scaled units."""
    return isinstance(w, Blocks) and tiles.target(w.codes.device).multiplies(w.format, act)


def linear(x: Tensor, w: Weights, bias: Tensor | None = None, *, act: Format | None = None) -> Tensor:
    """See `contract.Contract.linear`.

    Numerics: float32 accumulation, scale blocks in ascending K; a row's result depends on no other row, to the bit.
    FP8 matrix units add 128 products of block FP8's codes as `accumulation` says.
    """
    check_linear(x, w.shape, bias)
    _check(x, act, w)

    def fast(x: Tensor, bias: Tensor | None) -> Tensor:
        n, k = w.shape
        rows, bias = x.reshape(-1, k), _contiguous(bias)
        if rows.shape[0] == 0 or n == 0:
            return x.new_zeros(*x.shape[:-1], n)
        if isinstance(w, Fragments) and (act is None or act.scale == "e8m0"):
            from microscale.backends.triton import hopper

            a = rows
            if act is not None:  # where x is wider than bfloat16, so is the result
                a = rows_of(rows, act).x.to(x.dtype if x.dtype == torch.bfloat16 else torch.float32)
            cut = cuts.linear_cut(w.format, rows.shape[0], w.tiles, hopper.PARTS[a.dtype])
            y = attempt(
                lambda: hopper.linear(a, w, bias, cut),
                lambda: gemm.linear(a, w.plain, bias),
                *("linear", w.format.name, w.shape, a.dtype, cut),
            )
            return y.to(x.dtype).view(*x.shape[:-1], n)
        return gemm.linear(rows, _read(w, act), bias, act).view(*x.shape[:-1], n)

    def slow(x: Tensor, bias: Tensor | None) -> Tensor:
        return emulation.linear(x, emulation.Packed(unpack(w)), bias, act=act)

    return autograd.run(fast, slow, x, bias)


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Weights,
    w2: Weights,
    activation: Activation,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    expert_map: Tensor | None = None,
    weight_on_input: bool = False,
    act: Format | None = None,
) -> Tensor:
    """See `contract.Contract.moe`. Never waits for the device: a token with an id out of range becomes NaN.

    Numerics: as `linear`; the intermediate is rounded once to x's dtype, and the sum over experts is float32. Hopper's
    own kernels round each token's share of an expert to x's dtype too, before that sum. With `act` the intermediate is
    rounded to it from float32.
    """
    check_moe(x, topk_ids, topk_weights, w13.shape, w2.shape, activation, b13, b2, weight_on_input)
    _check(x, act, w13, w2)

    def fast(x: Tensor, topk_weights: Tensor, b13: Tensor | None, b2: Tensor | None) -> Tensor:
        if 0 in (topk_ids.numel(), *w13.shape, *w2.shape):
            return x.new_zeros(x.shape[0], w2.shape[1])
        rest = (activation, _contiguous(b13), _contiguous(b2), _contiguous(expert_map), weight_on_input)
        return _experts(x, topk_ids, topk_weights, w13, w2, *rest, add_up=True, act=act)

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

    return autograd.run(fast, slow, x, topk_weights, b13, b2)


def shares(
    x: Tensor,
    choice: Choice,
    w13: Weights,
    w2: Weights,
    activation: Activation,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    act: Format | None = None,
) -> Tensor:
    """What `moe` adds up for the routes that are chosen so, for a caller who adds: [M, T, N], by a token's slots.

    Numerics: float32 or x's dtype, and no gradients. x is [M, H], contiguous.
    """
    _check(x, act, w13, w2)
    b13, b2, top_k = _contiguous(b13), _contiguous(b2), choice.top_k

    def usual() -> Tensor:
        weights, ids = choice.routes()
        check_moe(x, ids, weights, w13.shape, w2.shape, activation, b13, b2, False)
        return _experts(x, ids, weights, w13, w2, activation, b13, b2, None, False, False, act)

    found = None
    own = _hopper(x, top_k, w13, w2, activation) if x.shape[0] == 1 and act is None else None
    if own is not None:
        from microscale.backends.triton import hopper_token

        fragments, (first, second) = own
        pair = first.of_experts(fragments[0], activation.apart), second.of_experts(fragments[1])
        if hopper_token.takes(x, choice, pair):
            found = attempt(
                lambda: hopper_token.shares(x, choice, *fragments, activation, b13, b2, pair),
                usual,
                *("shares", w13.format.name, w13.shape, activation, choice.block, *pair),
            )
    return (usual() if found is None else found).view(x.shape[0], top_k, -1)


def _experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Weights,
    w2: Weights,
    activation: Activation,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    weight_on_input: bool,
    add_up: bool,
    act: Format | None,
) -> Tensor:
    """Hopper's kernels where they take these weights, else those for every target: see `moe.moe`."""
    rest = (activation, b13, b2, expert_map, weight_on_input)

    def plain() -> Tensor:
        return experts.moe(x, topk_ids, topk_weights, _read(w13, act), _read(w2, act), *rest, add_up, act)

    if act is not None and act.scale == "f32" and tiles.target(x.device).hopper:
        from microscale.backends.triton import hopper_fp8

        first, second = (w if isinstance(w, Packed) else w.plain for w in (w13, w2))
        if not hopper_fp8.refuse(x, first, second, activation, (b13, b2), topk_weights, weight_on_input):
            matrices = (x, topk_ids, topk_weights, first, second)
            codes = partial(hopper_fp8.moe, *matrices, activation, b13, b2, expert_map, act, add_up)
            return attempt(codes, plain, "moe", act.name, w13.shape, activation)
    own = _hopper(x, topk_ids.shape[1], w13, w2, activation) if act is None else None
    if own is None:
        return plain()
    from microscale.backends.triton import hopper_experts

    fragments, pair = own
    given = (x, topk_ids, topk_weights, *fragments, *rest, pair)
    fast = partial(hopper_experts.moe, *given, add_up=add_up)
    return attempt(fast, plain, "moe", w13.format.name, w13.shape, activation, x.dtype, *pair)


def _hopper(
    x: Tensor, top_k: int, w13: Weights, w2: Weights, activation: Activation
) -> tuple[tuple[Fragments, Fragments], tuple[cuts.Cut, cuts.Cut]] | None:
    """The weights, and the cuts for x's tokens, where Hopper's kernels take these experts."""
    if not (isinstance(w13, Fragments) and isinstance(w2, Fragments)):
        return None
    from microscale.backends.triton import hopper, hopper_moe

    if hopper_moe.refuse(w13, activation):
        return None
    formats = (w13.format, w2.format)
    sizes = x.shape[0], top_k, w13.shape[0], w2.shape[-1]
    return (w13, w2), cuts.moe_cuts(formats, *sizes, hopper.PARTS[x.dtype])


def _contiguous(t: Tensor | None) -> Tensor | None:
    """As the kernels read it: one number behind the other."""
    return None if t is None else t.contiguous()


def _check(x: Tensor, act: Format | None, *weights: Weights) -> None:
    for w in weights:
        if act is None or _are_codes(w, act):
            continue
        if (why := refuse_pair(w.format.name, act.name)) is not None:
            raise BackendError(f"triton: {why}")
    if x.dtype not in _DTYPES:
        raise BackendError(f"triton takes bf16, fp16 and fp32 activations, not {x.dtype}")
