"""Attention of one query, span by span: what a step over keys adds to a span's sums, and how these are put together."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(n, oldest, keys, RING: tl.constexpr):
    """Where the tokens from the oldest on lie."""
    if RING:
        n += oldest
        n = tl.where(n < keys, n, n - keys)
    return n.to(tl.int64)


@triton.jit
def looked(query, key, value, seen, scaling, peak, total, acc, ALL: tl.constexpr):
    """The greatest logit so far, the sum of shares, and that of values by their shares, with these keys; ALL of them,
    or those that are seen."""
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
    if not ALL:
        logits = tl.where(seen[None, :], logits, float("-inf"))
    higher = tl.maximum(peak, tl.max(logits, 1))
    least = higher
    if not ALL:
        least = tl.where(higher == float("-inf"), 0.0, higher)  # nothing was looked at yet
    share = tl.exp(logits - least[:, None])
    shrink = tl.exp(peak - least)
    total = total * shrink + tl.sum(share, 1)
    acc = tl.dot(share.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def whole_step(
    query, k, v, k_k, v_k, mask, mask_k, at, oldest, keys, scaling, peak, total, acc, inner,
    KEYS: tl.constexpr, MASKED: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """`looked` at KEYS tokens from `at` on, all of them there and older than the one that is computed."""
    n = at + tl.arange(0, KEYS)
    row = row_of(n, oldest, keys, RING)[:, None]
    seen = n >= 0
    if MASKED:
        seen = tl.load(mask + n * mask_k) != 0
    read = seen[:, None] & inner[None, :]
    key = tl.load(k + row * k_k + tl.arange(0, query.shape[1])[None, :], mask=read, other=0.0)
    value = tl.load(v + row * v_k + tl.arange(0, query.shape[1])[None, :], mask=read, other=0.0)
    return looked(query, key, value, seen, scaling, peak, total, acc, not MASKED)


@triton.jit
def _part(
    sums, peaks, totals, n, active, room, GROUP: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    """What GROUP heads found in span n, nothing past the last: sums, peaks and totals, one for each component.

    Read from where the stores of other programs met: this one's own cache may hold what lay there before.
    """
    r, d = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    there = (r < GROUP) & (n < active) & (d >= 0)
    at = r * room + n
    part = tl.load(sums + at * WIDTH + d, mask=there, other=0.0, cache_modifier=".cg")
    top = tl.load(peaks + at * 4 + d % 4, mask=there, other=float("-inf"), cache_modifier=".cg")
    whole = tl.load(totals + at * 4 + d % 4, mask=there, other=0.0, cache_modifier=".cg")
    return part, top, whole


@triton.jit
def together(
    y, sums, peaks, totals, sinks, active, room, GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, AHEAD: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """What GROUP heads find, of which all that is given begins at the first, from all `active` spans, in their order.

    Few instructions, because to fetch those that run once takes longer than what they do; no exchange between threads,
    which is why each component has its own maximum; and AHEAD spans on their way at once.
    """
    r, d = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    peak = tl.full((HEADS, WIDTH), -3.4028234e38, tl.float32)  # less infinity is not a NaN
    total = tl.zeros((HEADS, WIDTH), tl.float32)
    acc = tl.zeros((HEADS, WIDTH), tl.float32)
    coming = ()
    for i in tl.static_range(AHEAD):
        part = _part(sums, peaks, totals, i, active, room, GROUP, HEADS, WIDTH)
        coming = coming + (part,)  # type: ignore[assignment] # noqa: RUF005 (Triton knows no unpacking)
    if SINKS:
        sink = tl.load(sinks + r + d * 0, mask=(r < GROUP) & (d >= 0), other=0.0).to(tl.float32)
    n = 0
    while n < active:
        later = ()
        for i in tl.static_range(AHEAD):
            higher = tl.maximum(peak, coming[i][1])
            shrink, share = tl.exp(peak - higher), tl.exp(coming[i][1] - higher)
            acc = acc * shrink + coming[i][0] * share
            total = total * shrink + coming[i][2] * share
            peak = higher
            part = _part(sums, peaks, totals, n + i + AHEAD, active, room, GROUP, HEADS, WIDTH)
            later = later + (part,)  # type: ignore[assignment] # noqa: RUF005
        coming = later
        n += AHEAD
    if SINKS:
        higher = tl.maximum(peak, sink)
        shrink = tl.exp(peak - higher)
        acc, total = acc * shrink, total * shrink + tl.exp(sink - higher)
    tl.store(y + r * D + d, (acc / total).to(y.dtype.element_ty), mask=(r < GROUP) & (d < D))
