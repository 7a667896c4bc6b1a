"""Attention of one query for each sequence: the keys are cut into spans, and their sums are put together.

The slow twin is transformers' own: scores over all keys, a head's sink among them where it has one, and the sink's
share left out. A span of keys that are not looked at is not read, so a cache with room for many tokens costs what those
in it do; few of them are one span, which nothing is put together with. Of several spans the program that comes last
puts all of them together, in their order.

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

_KEYS = 256  # that a program looks at in a step, at most
_SPANS = 16  # at most
_HELD = 1 << 14  # numbers of spans' sums that a program holds as it puts them together


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
def _places(
    at, filled, oldest, keys, mask, mask_k, KEYS: tl.constexpr, MASKED: tl.constexpr, RING: tl.constexpr
):
    """Of KEYS tokens from `at` on: which are looked at, which is the newest, and their rows."""
    n = at + tl.arange(0, KEYS)
    seen = n < filled
    if MASKED:
        seen = seen & (tl.load(mask + n * mask_k, mask=seen, other=0) != 0)
    newest = n == filled - 1
    if RING:
        n = (n + oldest) % keys
    return seen, newest, n.to(tl.int64)


@triton.jit
def _looked(query, key, value, seen, scaling, peak, total, acc):
    """The greatest logit so far, the sum of shares, and that of values by their shares, with these keys."""
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
    logits = tl.where(seen[None, :], logits, float("-inf"))
    higher = tl.maximum(peak, tl.max(logits, 1))
    share = tl.exp(logits - higher[:, None])
    shrink = tl.exp(peak - higher)
    total = total * shrink + tl.sum(share, 1)
    acc = tl.dot(share.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _together(
    y, sums, peaks, totals, sinks, first, active, room, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, SPANS: tl.constexpr, AT_ONCE: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """What GROUP heads find, of which y and sinks begin at the first, from all `active` spans, in their order.

    Read from where the stores of other programs met: this one's own cache may hold what lay there before.
    """
    r, d = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    real = (r < GROUP)[None, :]
    peak = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, WIDTH), tl.float32)
    if SINKS:
        sink = tl.load(sinks + r, mask=r < GROUP, other=0.0).to(tl.float32)
    for i in tl.static_range(0, SPANS, AT_ONCE):
        n = i + tl.arange(0, AT_ONCE)[:, None]
        there, place = (n < active) & real, (first + r[None, :]) * room + n
        at = sums + place[:, :, None] * WIDTH + d[None, None, :]
        parts = tl.load(at, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        tops = tl.load(peaks + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        wholes = tl.load(totals + place, mask=there, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(tops, 0))
        least = tl.where(higher == float("-inf"), 0.0, higher)  # nothing was looked at yet
        shrink, shares = tl.exp(peak - least), tl.exp(tops - least[None, :])
        total = total * shrink + tl.sum(wholes * shares, 0)
        acc = acc * shrink[:, None] + tl.sum(parts * shares[:, :, None], 0)
        peak = higher
    if SINKS:
        higher = tl.maximum(peak, sink)
        shrink = tl.exp(peak - higher)
        acc, total = acc * shrink[:, None], total * shrink + tl.exp(sink - higher)
    here = (r < GROUP)[:, None] & (d < D)[None, :]
    tl.store(y + r[:, None] * D + d[None, :], (acc / total[:, None]).to(y.dtype.element_ty), mask=here)


@triton.jit
def _span_kernel(
    y, sums, peaks, totals, arrived, q, new_k, new_v, k, v, mask, position, sinks, cos, sin, q_weight, k_weight,
    eps, scaling, keys, room, key_heads, q_b, new_k_b, new_v_b, q_h, k_b, k_h, k_k, v_b, v_h, v_k, mask_b, mask_k,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    KEYS: tl.constexpr, SPANS: tl.constexpr, AT_ONCE: tl.constexpr, LONG: tl.constexpr, MASKED: tl.constexpr,
    RING: tl.constexpr, TURN: tl.constexpr, NORM: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    filled, oldest, token = keys, 0, 0
    if RING:
        token = tl.load(position)
        filled = tl.minimum(token + 1, keys).to(tl.int32)
        oldest = ((token + 1 - filled) % keys).to(tl.int32)
    length = tl.maximum(tl.cdiv(filled, SPANS * KEYS), 1) * KEYS if LONG else KEYS
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
    # Keys and values of earlier tokens are older than the kernel ahead, which may still run.
    at = span * length
    seen, newest, n = _places(at, filled, oldest, keys, mask, mask_k, KEYS, MASKED, RING)
    read = (seen & (n != token % keys) if TURN else seen)[:, None] & inner[None, :]
    key = tl.load(kept_k + n[:, None] * k_k + d[None, :], mask=read, other=0.0)
    value = tl.load(kept_v + n[:, None] * v_k + d[None, :], mask=read, other=0.0)
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
    end = tl.minimum(at + length, filled)
    if PDL:
        if LONG and RING:
            LINES: tl.constexpr = triton.next_power_of_2(
                triton.cdiv(D * k.dtype.element_ty.primitive_bitwidth, 1024)
            )
            line = tl.arange(0, LINES) * (D // LINES)  # none past the row, which may be a cache's last
            later = at + KEYS
            while later < end:
                row = ((tl.minimum(later + tl.arange(0, KEYS), filled - 1) + oldest) % keys).to(tl.int64)[
                    :, None
                ]
                ask(kept_k + row * k_k + line[None, :])
                ask(kept_v + row * v_k + line[None, :])
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
        peak, total, acc = _looked(query, key, value, seen, scaling, peak, total, acc)
    if LONG:
        after = at + KEYS
        while after < end:
            seen, newest, n = _places(after, filled, oldest, keys, mask, mask_k, KEYS, MASKED, RING)
            some = after < filled
            if MASKED:
                some = tl.sum(seen.to(tl.int32), 0) > 0
            if some:
                read = (seen & (n != token % keys) if TURN else seen)[:, None] & inner[None, :]
                key = tl.load(kept_k + n[:, None] * k_k + d[None, :], mask=read, other=0.0)
                value = tl.load(kept_v + n[:, None] * v_k + d[None, :], mask=read, other=0.0)
                if TURN:
                    key = tl.where(newest[:, None], fresh[None, :], key)
                    value = tl.where(newest[:, None], fresh_value[None, :], value)
                peak, total, acc = _looked(query, key, value, seen, scaling, peak, total, acc)
            after += KEYS
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
        tl.store(peaks + place, peak, mask=r < GROUP)
        tl.store(totals + place, total, mask=r < GROUP)
        tl.debug_barrier()  # one thread's release speaks for all threads' stores
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel", scope="gpu") == active - 1:
            tl.store(arrived + tl.program_id(0), 0)  # for the next launch
            _together(
                y + first * D, sums, peaks, totals, sinks + h * GROUP if SINKS else sinks, first, active, room,
                GROUP, HEADS, D, WIDTH, SPANS, AT_ONCE, SINKS,
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


def cut(wide: int, itemsize: int, shared: int) -> tuple[int, int]:
    """Keys that a program looks at in a step, and its warps, for heads of `wide` numbers of so many bytes."""
    keys = _KEYS
    while (
        keys > 16 and 2 * keys * wide * itemsize > shared * 3 // 4
    ):  # keys and values pass through scratchpad
        keys //= 2
    return keys, 8 if keys * wide * itemsize > 1 << 14 else 4


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
    at_once, warps = cut(wide, query.itemsize, target.shared)
    spans = min(max(1, -(-keys // at_once)), _SPANS)
    sums, peaks, totals = (
        torch.empty(batch * heads * spans * n if spans > 1 else 0, device=query.device) for n in (wide, 1, 1)
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
    together = triton.next_power_of_2(group)
    with tiles.on(query.device):
        _span_kernel[(batch * key_heads, spans)](
            y, sums, peaks, totals, arrived, query, new_key, new_value, key, value, mask, position, sinks, *turns,
            scaling, keys, spans, key_heads, *strides, *key.stride()[:3], *value.stride()[:3], *mask_strides,
            GROUP=group, ROWS=max(16, together), HEADS=together, D=width, WIDTH=wide, KEYS=at_once, SPANS=_SPANS,
            AT_ONCE=min(_SPANS, max(1, _HELD // (together * wide))), LONG=keys > _SPANS * at_once,
            MASKED=mask is not None, RING=position is not None, TURN=turn is not None,
            NORM=turn is not None and turn.q_weight is not None, SINKS=sinks is not None, PDL=pdl,
            num_warps=warps, enable_fp_fusion=False, **tiles.launch(pdl),
        )  # fmt: skip
    return y
