"""Attention of one query for each sequence, with sinks: the keys are cut into spans, and their sums are put together.

The slow twin is transformers' own: scores over all keys, the sink among them, and the sink's share left out. Here a
span of keys that are not looked at is not read, so a cache with room for many tokens costs what those in it do.

Spans begin at the same tokens however long a cache is (up to 4096 tokens, and then in steps of that), and a ring is
read from its oldest token on. So a token gets the same bits from a cache that grows and from one that does not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton import tiles

_KEYS = 64  # that a program looks at in a step
_SPANS = 64  # at most; always as many are put together, so that the sum has one order


@triton.jit
def _turned(x, partner, cos, sin, first):
    """Components of a head, with the other coordinate of each, turned; `first`: it is the first of the two.

    Rounded where torch's operators round, so that keys are those of a prompt, to the bit.
    """
    own = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    other = (partner.to(tl.float32) * sin).to(x.dtype).to(tl.float32)
    return (own + tl.where(first, -other, other)).to(x.dtype)


@triton.jit
def ask(p):
    """Lines of memory that should be in the L2 cache soon. It changes nothing and waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [p], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _span_kernel(
    y,
    sums,
    peaks,
    totals,
    q,
    k,
    v,
    mask,
    position,
    sinks,
    cos,
    sin,
    scaling,
    keys,
    spans,
    key_heads,
    q_b,
    q_h,
    k_b,
    k_h,
    k_k,
    v_b,
    v_h,
    v_k,
    mask_b,
    mask_k,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    STEPS: tl.constexpr,
    ONE: tl.constexpr,
    MASKED: tl.constexpr,
    RING: tl.constexpr,
    TURN: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    b = (tl.program_id(0) // key_heads).to(tl.int64)
    h = tl.program_id(0) % key_heads
    r, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = h * GROUP + r
    here = (r < GROUP)[:, None] & (d < D)[None, :]
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    filled, oldest = keys, 0
    if RING:
        token = tl.load(position)
        filled = tl.minimum(token + 1, keys).to(tl.int32)
        oldest = ((token + 1 - filled) % keys).to(tl.int32)
    if TURN:
        HALF: tl.constexpr = D // 2
        c = tl.load(cos + token * HALF + d % HALF, mask=d < D, other=0.0).to(tl.float32)
        s = tl.load(sin + token * HALF + d % HALF, mask=d < D, other=0.0).to(tl.float32)
        partner = (d + HALF) % D
    if PDL:
        if RING:  # keys of earlier tokens, before a product that also starts early asks for its weights
            LINES: tl.constexpr = triton.cdiv(D * k.dtype.element_ty.primitive_bitwidth, 1024)
            line = tl.arange(0, triton.next_power_of_2(LINES)) * (D // LINES)
            for step in range(STEPS):
                n = (tl.program_id(1) * STEPS + step) * KEYS + tl.arange(0, KEYS)
                if tl.min(n) < filled:
                    row = ((tl.minimum(n, filled - 1) + oldest) % keys).to(tl.int64)[:, None]
                    ask(k + b * k_b + h * k_h + row * k_k + line[None, :])
                    ask(v + b * v_b + h * v_h + row * v_k + line[None, :])
        gdc_wait()
    query = tl.load(q + b * q_b + head[:, None] * q_h + d[None, :], mask=here, other=0.0)
    if TURN:
        other = tl.load(q + b * q_b + head[:, None] * q_h + partner[None, :], mask=here, other=0.0)
        query = _turned(query, other, c[None, :], s[None, :], (d < HALF)[None, :])
        raw = q + b * q_b + (key_heads * GROUP + h) * q_h
        new_key = tl.load(raw + d, mask=d < D, other=0.0)
        new_key = _turned(new_key, tl.load(raw + partner, mask=d < D, other=0.0), c, s, d < HALF)
        new_value = tl.load(raw + key_heads * q_h + d, mask=d < D, other=0.0)
    for step in range(STEPS):
        n = (tl.program_id(1) * STEPS + step) * KEYS + tl.arange(0, KEYS)
        seen = n < filled
        if MASKED:
            seen = seen & (tl.load(mask + b * mask_b + n * mask_k, mask=seen, other=0) != 0)
        if tl.sum(seen.to(tl.int32), 0) > 0:
            inside = seen[:, None] & (d < D)[None, :]
            newest = n == filled - 1
            if RING:
                n = (n + oldest) % keys
            row = n.to(tl.int64)[:, None]
            key = tl.load(k + b * k_b + h * k_h + row * k_k + d[None, :], mask=inside, other=0.0)
            value = tl.load(v + b * v_b + h * v_h + row * v_k + d[None, :], mask=inside, other=0.0)
            if TURN:  # what is in the token's slot is older; no other program reads it
                key = tl.where(newest[:, None], new_key[None, :], key)
                value = tl.where(newest[:, None], new_value[None, :], value)
                mine = (d < D) & (tl.sum(newest.to(tl.int32), 0) > 0)
                tl.store(k + b * k_b + h * k_h + token % keys * k_k + d, new_key, mask=mine)
                tl.store(v + b * v_b + h * v_h + token % keys * v_k + d, new_value, mask=mine)
            logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
            logits = tl.where(seen[None, :], logits, float("-inf"))
            higher = tl.maximum(peak, tl.max(logits, 1))
            share = tl.exp(logits - higher[:, None])
            shrink = tl.exp(peak - higher)
            total = total * shrink + tl.sum(share, 1)
            acc = tl.dot(share.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
            peak = higher
    out = b * key_heads * GROUP + head
    if ONE:
        sink = tl.load(sinks + head, mask=r < GROUP, other=0.0).to(tl.float32)
        higher = tl.maximum(peak, sink)
        shrink = tl.exp(peak - higher)
        acc = acc * shrink[:, None] / (total * shrink + tl.exp(sink - higher))[:, None]
        tl.store(y + out[:, None] * D + d[None, :], acc.to(y.dtype.element_ty), mask=here)
    else:
        place = out * spans + tl.program_id(1)
        tl.store(sums + place[:, None] * WIDTH + d[None, :], acc, mask=(r < GROUP)[:, None])
        tl.store(peaks + place, peak, mask=r < GROUP)
        tl.store(totals + place, total, mask=r < GROUP)


@triton.jit
def _together_kernel(
    y, sums, peaks, totals, sinks, heads, spans,
    D: tl.constexpr, WIDTH: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, ROUND), tl.arange(0, WIDTH)
    place = row * spans + s
    peak = tl.load(peaks + place, mask=s < spans, other=float("-inf"))
    total = tl.load(totals + place, mask=s < spans, other=0.0)
    part = tl.load(sums + place[:, None] * WIDTH + d[None, :], mask=(s < spans)[:, None], other=0.0)
    sink = tl.load(sinks + row % heads).to(tl.float32)
    higher = tl.maximum(tl.max(peak, 0), sink)
    shrink = tl.exp(peak - higher)
    whole = tl.sum(total * shrink, 0) + tl.exp(sink - higher)
    acc = tl.sum(part * shrink[:, None], 0) / whole
    tl.store(y + row * D + d, acc.to(y.dtype.element_ty), mask=d < D)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor,
    scaling: float,
    position: Tensor | None = None,
) -> Tensor:
    """softmax over a query's keys and its head's sink, of which the sink has no value.

    Numerics: logits and sums in float32; a key's share is rounded to the values' dtype before it multiplies its value.

    Args:
        query: [B, heads, 1, D], key, value: [B, key heads, K, D] with components side by side; all of one dtype.
        mask: bool [B or 1, 1, 1, K], True: look at it; None: at all.
        sinks: [heads].
        position: int64 [1]: keys are a ring, token t in place t % K, and this is the last of them; no mask is given.
            None: all K are there.
    Returns:
        [B, 1, heads, D].
    """
    return _attend(query[:, :, 0], query.shape[1], key, value, mask, sinks, scaling, position, None)


def attend_token(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor,
    scaling: float,
    position: Tensor,
) -> Tensor:
    """`attend` of a token whose queries and key get their rotary embedding first, and whose key and value are stored.

    The two halves of a head are the two coordinates that are turned, and rounded as torch's operators round them.

    Args:
        qkv: [B, heads + 2 key heads, D], contiguous: queries, keys, values; of one dtype with the rest.
        cos, sin: [positions, D / 2], contiguous.
        keys, values: [B, key heads, K, D], a ring, written to.
        position: int64 [1] on the device, of the token.
    Returns:
        [B, 1, heads, D].
    """
    heads = qkv.shape[1] - 2 * keys.shape[1]
    return _attend(qkv, heads, keys, values, None, sinks, scaling, position, (cos, sin))


def _attend(
    query: Tensor,
    heads: int,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor,
    scaling: float,
    position: Tensor | None,
    turns: tuple[Tensor, Tensor] | None,
) -> Tensor:
    (batch, _, width), (_, key_heads, keys, _) = query.shape, key.shape
    y = torch.empty(batch, 1, heads, width, dtype=query.dtype, device=query.device)
    if 0 in y.shape:
        return y
    pairs, group = batch * key_heads, heads // key_heads
    steps = max(1, -(-keys // (_SPANS * _KEYS)))
    spans = max(1, -(-keys // (steps * _KEYS)))
    wide = max(16, triton.next_power_of_2(width))
    sums, peaks, totals = (
        torch.empty(batch * heads * spans * n if spans > 1 else 0, device=query.device) for n in (wide, 1, 1)
    )
    strides: tuple[int, ...] = (0, 0)
    if mask is not None:
        # As wide as the rest: Triton orders a product's columns by the narrowest number that goes into it.
        mask = mask.to(query.dtype)
        strides = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(3))
    pdl = tiles.target(query.device).early
    with tiles.on(query.device):
        _span_kernel[(pairs, spans)](
            y, sums, peaks, totals, query, key, value, mask, position, sinks, *(turns or (None, None)), scaling,
            keys, spans, key_heads,
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], *strides,
            GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), D=width, WIDTH=wide, KEYS=_KEYS,
            STEPS=steps, ONE=spans == 1, MASKED=mask is not None, RING=position is not None,
            TURN=turns is not None, PDL=pdl, num_warps=4, enable_fp_fusion=False, **tiles.launch(pdl),
        )  # fmt: skip
        if spans > 1:
            _together_kernel[(batch * heads,)](
                y, sums, peaks, totals, sinks, heads, spans,
                D=width, WIDTH=wide, ROUND=_SPANS, PDL=pdl, enable_fp_fusion=False, **tiles.launch(pdl),
            )  # fmt: skip
    return y
