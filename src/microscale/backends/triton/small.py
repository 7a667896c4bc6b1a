"""What else a token needs, each in one kernel where torch has many: norms, routes, the turn of queries and keys."""

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


@triton.jit
def _route_kernel(ids, weights, logits, E, TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    e, t = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    left = tl.load(logits + row * E + e, mask=e < E, other=float("-inf")).to(tl.float32)
    left = tl.where(left == left, left, float("inf"))  # a NaN is chosen, and spreads
    left = tl.where(e < E, left, float("-inf"))
    free = e < E
    chosen = tl.full((SLOTS,), float("-inf"), tl.float32)
    expert = tl.zeros((SLOTS,), tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.max(left, 0)
        at = tl.min(tl.where(free & (left == best), e, BLOCK), 0)
        chosen = tl.where(t == i, best, chosen)
        expert = tl.where(t == i, at, expert)
        free = free & (e != at)
        left = tl.where(e == at, float("-inf"), left)
    share = tl.exp(chosen - tl.max(chosen, 0))
    share = share / tl.sum(share, 0)
    tl.store(ids + row * TOP_K + t, expert.to(tl.int64), mask=t < TOP_K)
    tl.store(weights + row * TOP_K + t, share.to(weights.dtype.element_ty), mask=t < TOP_K)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The greatest logits of each row, softmax over them in float32, rounded to their dtype.

    Among equal ones the lower expert is first. A row with a NaN or an infinity has weights that are NaN.

    Args:
        logits: [M, E], contiguous, with E of at least `top_k`.
    Returns:
        weights [M, top_k], and int64 ids [M, top_k].
    """
    rows, experts = logits.shape
    weights = torch.empty(rows, top_k, dtype=logits.dtype, device=logits.device)
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=logits.device)
    with tiles.on(logits.device):
        _route_kernel[(rows,)](
            ids, weights, logits, experts, TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k),
            BLOCK=triton.next_power_of_2(experts), num_warps=1,
        )  # fmt: skip
    return weights, ids
