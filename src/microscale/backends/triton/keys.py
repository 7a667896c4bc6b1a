"""Integers in the order of logits, which say whose each is, too: the greatest of them is the choice and its logit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keys_of(logits, e, E, SIZE: tl.constexpr):
    """Of logits e, those past E being infinities; among equal ones that of the lower e is the greater.

    A NaN is as good as an infinity, so it is chosen, and spreads.

    Args:
        SIZE: bits of a logit, 16 or, of any dtype, 32. A key has as many again, so 16 are for less than 2^16 logits;
            of 32 bits in all a warp finds the greatest in one instruction.
    """
    value = tl.load(logits + e, mask=e < E, other=float("-inf")).to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    value = tl.where(value == 0.0, 0.0, value)  # of either sign
    if SIZE == 16:
        bits = value.to(logits.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = value.to(tl.int32, bitcast=True).to(tl.int64)
    order = bits ^ (bits >> SIZE & (1 << SIZE - 1) - 1)  # of negative numbers a greater magnitude is less
    return (order << SIZE) + ((1 << SIZE) - 1 - e.to(order.dtype))


@triton.jit
def place_of(key, SIZE: tl.constexpr):
    """Whose a key is."""
    return (1 << SIZE) - 1 - (key & (1 << SIZE) - 1)


@triton.jit
def logit_of(key, dtype: tl.constexpr, SIZE: tl.constexpr):
    """What it is, float32; dtype: of the logits."""
    order = key >> SIZE
    bits = order ^ (order >> SIZE & (1 << SIZE - 1) - 1)
    if SIZE == 16:
        return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    else:
        return bits.to(tl.int32).to(tl.float32, bitcast=True)
