"""What else a decoded token needs, each in one kernel where torch has many: norms, and the turn of queries and keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microscale.backends.triton import tiles


@triton.jit
def _rms_norm_kernel(y, x, w, eps, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * N
    n = tl.arange(0, BLOCK)
    value = tl.load(x + row + n, mask=n < N, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / N + eps)
    weight = tl.load(w + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + row + n, (weight * (value * scale)).to(y.dtype.element_ty), mask=n < N)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in float32, rounded once to x's dtype.

    Args:
        x: [..., H], contiguous. weight: [H].
    """
    y, n = torch.empty_like(x), weight.numel()
    with tiles.on(x.device):
        _rms_norm_kernel[(x.numel() // n,)](
            y, x, weight, eps, n, BLOCK=triton.next_power_of_2(n), num_warps=8
        )
    return y


@triton.jit
def _rounded(x, like):
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _turn_kernel(
    y, keys, values, q, k, v, cos, sin, slot, key_heads, turns_b,
    keys_b, keys_h, keys_k, values_b, values_h, values_k,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // (HEADS + 2 * key_heads)).to(tl.int64)
    h = tl.program_id(0) % (HEADS + 2 * key_heads)
    d = tl.arange(0, BLOCK)
    inside = d < HALF
    place = tl.load(slot)
    if h >= HEADS + key_heads:
        source = v + (b * key_heads + h - HEADS - key_heads) * 2 * HALF
        target = values + b * values_b + (h - HEADS - key_heads) * values_h + place * values_k
    elif h >= HEADS:
        source = k + (b * key_heads + h - HEADS) * 2 * HALF
        target = keys + b * keys_b + (h - HEADS) * keys_h + place * keys_k
    else:
        source = q + (b * HEADS + h) * 2 * HALF
        target = y + (b * HEADS + h) * 2 * HALF
    first = tl.load(source + d, mask=inside)
    second = tl.load(source + HALF + d, mask=inside)
    if h < HEADS + key_heads:
        c = tl.load(cos + b * turns_b + d, mask=inside).to(tl.float32)
        s = tl.load(sin + b * turns_b + d, mask=inside).to(tl.float32)
        x1, x2 = first.to(tl.float32), second.to(tl.float32)
        # Rounded where torch's operators round, so that keys are those of a prompt, to the bit.
        first = (_rounded(x1 * c, q) - _rounded(x2 * s, q)).to(q.dtype.element_ty)
        second = (_rounded(x2 * c, q) + _rounded(x1 * s, q)).to(q.dtype.element_ty)
    tl.store(target + d, first, mask=inside)
    tl.store(target + HALF + d, second, mask=inside)


def turn_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, slot: Tensor
) -> Tensor:
    """Rotary embedding of one token's queries and keys; keys and values go into their slot of a cache.

    The two halves of a head are the two coordinates that are turned.

    Args:
        q: [B, heads, D], k, v: [B, key heads, D]; contiguous, and of one dtype with the rest.
        cos, sin: [B or 1, 1, D / 2].
        keys, values: [B, key heads, slots, D], written to.
        slot: int64 [1], on the device.
    Returns:
        The turned queries, [B, heads, 1, D].
    """
    batch, heads, width = q.shape
    key_heads = k.shape[1]
    y = torch.empty(batch, heads, 1, width, dtype=q.dtype, device=q.device)
    with tiles.on(q.device):
        _turn_kernel[(batch * (heads + 2 * key_heads),)](
            y, keys, values, q, k, v, cos, sin, slot, key_heads, cos.stride(0) if cos.shape[0] > 1 else 0,
            *keys.stride()[:3], *values.stride()[:3],
            HEADS=heads, HALF=width // 2, BLOCK=triton.next_power_of_2(width // 2),
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y
