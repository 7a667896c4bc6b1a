"""Attention of one query for each sequence: the keys are cut into spans, and their sums are put together.

The slow twin is transformers' own: scores over all keys, a head's sink among them where it has one, and the sink's
share left out. A span of keys that are not looked at is not read, so a cache with room for many tokens costs what those
in it do; few of them are one span, which nothing is put together with. Of several spans the program that comes last
puts all of them together, in their order. Within a span of several steps the last one comes first.

Where spans begin depends on how many tokens are looked at, and not on how long a cache is; and a ring is read from its
oldest token on. So a token gets the same bits from a cache that grows and from one that does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from microscale.backends.triton import tiles
from microscale.backends.triton.spans import looked, row_of, together, whole_step

_KEYS = 128  # that a program looks at in a step, at most
_SPANS = 32  # at most, for putting them together takes as long as looking at so many keys
_PROGRAMS = 256  # that a sequence is cut into at most: two for each multiprocessor
_AHEAD = 4  # spans whose sums are on their way as they are put together


@triton.jit
def _turned(x, partner, cos, sin, first):
    """Components of a head, with the other coordinate of each, turned; `first`: it is the first of the two.

    Rounded where torch's operators round, so that keys are those of a prompt, to the bit.
    """
    own = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    other = (partner.to(tl.float32) * sin).to(x.dtype).to(tl.float32)
    return (own + tl.where(first, -other, other)).to(x.dtype)


@triton.jit
def _normed(x, scale, w):
    """Components times what makes their head's mean square 1, and then their weight: rounded twice, as modules do."""
    plain = (x.to(tl.float32) * scale).to(x.dtype).to(tl.float32)
    return (plain * w.to(tl.float32)).to(x.dtype)


@triton.jit
def ask(p):
    """Lines of memory that should be in the L2 cache soon. It changes nothing and waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.b32 $0, 0;", "=r,l", [p], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _span_kernel(
    y, sums, peaks, totals, arrived, q, new_k, new_v, k, v, mask, position, sinks, cos, sin, q_weight, k_weight,
    eps, scaling, keys, room, key_heads, q_b, new_k_b, new_v_b, q_h, k_b, k_h, k_k, v_b, v_h, v_k, mask_b, mask_k,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr, SPANS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, LONG: tl.constexpr,
    MASKED: tl.constexpr, RING: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr, SINKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    filled, oldest, token = keys, 0, 0
    if RING:
        token = tl.load(position)
        filled = tl.minimum(token + 1, keys).to(tl.int32)
        oldest = ((token + 1 - filled) % keys).to(tl.int32)
    length = tl.maximum(tl.cdiv(tl.cdiv(filled, SPANS), KEYS), 1) * KEYS if LONG else KEYS
    active = tl.maximum(tl.cdiv(filled, length), 1)
    span = tl.program_id(1)
    if span >= active:
        return
    b = (tl.program_id(0) // key_heads).to(tl.int64)
    h = tl.program_id(0) % key_heads
    r, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    head = h * GROUP + r
    inner = d < D
    here = (r < GROUP)[:, None] & inner[None, :]
    kept_k, kept_v, mask = k + b * k_b + h * k_h, v + b * v_b + h * v_h, mask + b * mask_b if MASKED else mask
    # A span's last step comes first: it is on its way before the kernel ahead, which may still run, has ended, and is
    # the one that the token itself may be in. Keys and values of earlier tokens are older than that kernel.
    at = span * length
    end = tl.minimum(at + length, filled)
    last = at
    if LONG:
        last += (tl.maximum(tl.cdiv(end - at, KEYS), 1) - 1) * KEYS
    n = last + tl.arange(0, KEYS)
    seen, newest = n < filled, n == filled - 1
    if MASKED:
        seen = seen & (tl.load(mask + n * mask_k, mask=seen, other=0) != 0)
    row = row_of(n, oldest, keys, RING)[:, None]
    read = (seen & (n < filled - 1) if TURN else seen)[:, None] & inner[None, :]
    key = tl.load(kept_k + row * k_k + d[None, :], mask=read, other=0.0)
    value = tl.load(kept_v + row * v_k + d[None, :], mask=read, other=0.0)
    if SINKS:
        sink = tl.load(sinks + head, mask=r < GROUP, other=0.0).to(tl.float32)
    if TURN:
        HALF: tl.constexpr = D // 2
        partner = (d + HALF) % D
        c = tl.load(cos + token * HALF + d % HALF, mask=inner, other=0.0).to(tl.float32)
        s = tl.load(sin + token * HALF + d % HALF, mask=inner, other=0.0).to(tl.float32)
    if NORM:
        q_w, q_v = (
            tl.load(q_weight + d, mask=inner, other=0.0),
            tl.load(q_weight + partner, mask=inner, other=0.0),
        )
        k_w, k_v = (
            tl.load(k_weight + d, mask=inner, other=0.0),
            tl.load(k_weight + partner, mask=inner, other=0.0),
        )
    if PDL:
        if LONG and RING:
            LINES: tl.constexpr = triton.next_power_of_2(
                triton.cdiv(D * k.dtype.element_ty.primitive_bitwidth, 1024)
            )
            line = tl.arange(0, LINES) * (D // LINES)  # none past the row, which may be a cache's last
            later = at
            while later < last:
                place = row_of(later + tl.arange(0, KEYS), oldest, keys, RING)[:, None]
                ask(kept_k + place * k_k + line[None, :])
                ask(kept_v + place * v_k + line[None, :])
                later += KEYS
        gdc_launch_dependents()
        gdc_wait()
    query = tl.load(q + b * q_b + head[:, None] * q_h + d[None, :], mask=here, other=0.0)
    if TURN:
        other = tl.load(q + b * q_b + head[:, None] * q_h + partner[None, :], mask=here, other=0.0)
        raw = new_k + b * new_k_b + h * D
        fresh = tl.load(raw + d, mask=inner, other=0.0)
        fresh_other = tl.load(raw + partner, mask=inner, other=0.0)
        fresh_value = tl.load(new_v + b * new_v_b + h * D + d, mask=inner, other=0.0)
        if NORM:
            wide = query.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
            query, other = _normed(query, scale, q_w[None, :]), _normed(other, scale, q_v[None, :])
            whole = fresh.to(tl.float32)
            size = tl.rsqrt(tl.sum(whole * whole, 0) / D + eps)
            fresh, fresh_other = _normed(fresh, size, k_w), _normed(fresh_other, size, k_v)
        query = _turned(query, other, c[None, :], s[None, :], (d < HALF)[None, :])
        fresh = _turned(fresh, fresh_other, c, s, d < HALF)
        # No other program reads the token's slot, in which something older lies.
        if span == active - 1:
            tl.store(kept_k + token % keys * k_k + d, fresh, mask=inner)
            tl.store(kept_v + token % keys * v_k + d, fresh_value, mask=inner)
        key = tl.where(newest[:, None], fresh[None, :], key)
        value = tl.where(newest[:, None], fresh_value[None, :], value)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    some = at < filled
    if MASKED:
        some = tl.sum(seen.to(tl.int32), 0) > 0
    if some:
        peak, total, acc = looked(query, key, value, seen, scaling, peak, total, acc, False)
    if LONG:
        if STAGES > 0:
            for before in tl.range(at, last, KEYS, num_stages=STAGES):
                peak, total, acc = whole_step(
                    query, kept_k, kept_v, k_k, v_k, mask, mask_k, before, oldest, keys, scaling, peak, total, acc,
                    inner, KEYS, MASKED, RING,
                )  # fmt: skip
        else:  # Triton's interpreter knows no such range
            while at < last:
                peak, total, acc = whole_step(
                    query, kept_k, kept_v, k_k, v_k, mask, mask_k, at, oldest, keys, scaling, peak, total, acc,
                    inner, KEYS, MASKED, RING,
                )  # fmt: skip
                at += KEYS
    first = (b * key_heads + h) * GROUP
    out = first + r
    if active == 1:
        if SINKS:
            higher = tl.maximum(peak, sink)
            shrink = tl.exp(peak - higher)
            acc, total = acc * shrink[:, None], total * shrink + tl.exp(sink - higher)
        tl.store(y + out[:, None] * D + d[None, :], (acc / total[:, None]).to(y.dtype.element_ty), mask=here)
    else:
        place = out * room + span
        tl.store(sums + place[:, None] * WIDTH + d[None, :], acc, mask=(r < GROUP)[:, None])
        for i in tl.static_range(4):  # so that who puts them together reads 16 bytes
            tl.store(peaks + place * 4 + i, peak, mask=r < GROUP)
            tl.store(totals + place * 4 + i, total, mask=r < GROUP)
        tl.debug_barrier()  # one thread's release speaks for all threads' stores
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == active - 1:
            tl.store(arrived + tl.program_id(0), 0)  # for the next launch
            begin = first * room
            together(
                y + first * D, sums + begin * WIDTH, peaks + begin * 4, totals + begin * 4,
                sinks + h * GROUP if SINKS else sinks, active, room, GROUP, HEADS, D, WIDTH, AHEAD, SINKS,
            )  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """What a token goes through before it is looked at: norms of its heads, where there are such, and its turning.

    The two halves of a head are the two coordinates that are turned, and rounded as torch's operators round them.

    Attributes:
        cos, sin: [positions, D / 2], contiguous.
        q_weight, k_weight: [D], of RMS norms of each head of a query and a key; None: there are none.
        eps: of these norms.
    """

    cos: Tensor
    sin: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    eps: float = 0.0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    position: Tensor | None = None,
) -> Tensor:
    """softmax over a query's keys and its head's sink, of which the sink has no value.

    Numerics: logits and sums in float32; a key's share is rounded to the values' dtype before it multiplies its value.

    Args:
        query: [B, heads, 1, D], key, value: [B, key heads, K, D] with components side by side; all of one dtype.
        mask: bool [B or 1, 1, 1, K], True: look at it; None: at all.
        sinks: [heads]; None: there are none, and a key at least.
        position: int64 [1]: keys are a ring, token t in place t % K, and this is the last of them; no mask is given.
            None: all K are there.
    Returns:
        [B, 1, heads, D].
    """
    pairs = key.shape[0] * key.shape[1]
    arrived = torch.zeros(pairs, dtype=torch.int32, device=query.device)
    strides = *query.stride()[:1], 0, 0, query.stride(1)
    return _attend(query, None, None, strides, key, value, mask, sinks, scaling, position, None, arrived)


def attend_token(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    turn: Turn,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor | None,
    scaling: float,
    position: Tensor,
    arrived: Tensor,
) -> Tensor:
    """`attend` of a token whose queries and key are turned first, and whose key and value are stored.

    Args:
        query: [B, heads * D], new_key, new_value: [B, key heads * D], with columns side by side; of one dtype with
            the rest.
        keys, values: [B, key heads, K, D], a ring, written to.
        position: int64 [1] on the device, of the token.
        arrived: int32 [B * key heads], zeros; they are zeros again behind it.
    Returns:
        [B, 1, heads, D].
    """
    strides = query.stride(0), new_key.stride(0), new_value.stride(0), keys.shape[3]
    given = (query, new_key, new_value, strides, keys, values, None, sinks, scaling, position, turn, arrived)
    return _attend(*given)


def cut(wide: int, itemsize: int, shared: int) -> tuple[int, int, int]:
    """Keys that a program looks at in a step, its warps, and steps of a long span on their way, for heads of `wide`
    numbers of so many bytes."""
    keys, room = _KEYS, shared * 3 // 4  # keys and values pass through scratchpad
    while keys > 16 and 2 * keys * wide * itemsize > room:
        keys //= 2
    step = 2 * keys * wide * itemsize
    # Where there is little scratchpad steps are small; and for RDNA Triton 3.6 cannot compile them for 8 warps.
    return keys, 8 if step >= 1 << 15 and shared > 1 << 16 else 4, min(max(room // step, 1), 3)


def spans_of(key_heads: int) -> int:
    """Spans of a sequence at most, a power of two. Not by how many sequences there are, of which no bit depends."""
    return min(_SPANS, 1 << max(_PROGRAMS // key_heads, 1).bit_length() - 1)


def _attend(
    query: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    strides: tuple[int, ...],
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    position: Tensor | None,
    turn: Turn | None,
    arrived: Tensor,
) -> Tensor:
    batch, key_heads, keys, width = key.shape
    heads = query.shape[1] if turn is None else query.shape[1] // width
    y = torch.empty(batch, 1, heads, width, dtype=query.dtype, device=query.device)
    if 0 in y.shape:
        return y
    target, wide = tiles.target(query.device), max(16, triton.next_power_of_2(width))
    at_once, warps, stages = cut(wide, query.itemsize, target.shared)
    most = spans_of(key_heads)
    spans = min(max(1, -(-keys // at_once)), most)
    sums, peaks, totals = (
        torch.empty(batch * heads * spans * n if spans > 1 else 0, device=query.device) for n in (wide, 4, 4)
    )
    mask_strides: tuple[int, ...] = (0, 0)
    if mask is not None:
        # As wide as the rest: Triton orders a product's columns by the narrowest number that goes into it.
        mask = mask.to(query.dtype)
        mask_strides = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(3))
    turns: tuple[Tensor | float | None, ...] = (None, None, None, None, 0.0)
    if turn is not None:
        turns = (turn.cos, turn.sin, turn.q_weight, turn.k_weight, turn.eps)
    pdl, group = target.early, heads // key_heads
    padded = triton.next_power_of_2(group)
    with tiles.on(query.device):
        _span_kernel[(batch * key_heads, spans)](
            y, sums, peaks, totals, arrived, query, new_key, new_value, key, value, mask, position, sinks, *turns,
            scaling, keys, spans, key_heads, *strides, *key.stride()[:3], *value.stride()[:3], *mask_strides,
            GROUP=group, ROWS=max(16, padded), HEADS=padded, D=width, WIDTH=wide, KEYS=at_once, SPANS=most,
            STAGES=0 if tiles.INTERPRETED else stages, AHEAD=min(most, _AHEAD), LONG=keys > most * at_once,
            MASKED=mask is not None, RING=position is not None, TURN=turn is not None,
            NORM=turn is not None and turn.q_weight is not None, SINKS=sinks is not None, PDL=pdl,
            num_warps=warps, **tiles.launch(pdl, fused=False),
        )  # fmt: skip
    return y
