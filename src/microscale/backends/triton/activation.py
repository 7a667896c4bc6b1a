"""What stands between an expert's two products, in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _tanh(v):
    """Within a few units of the last place everywhere: near 0 by its series, since 1 - exp(-2 |v|) cancels there."""
    s = v * v
    series = 0.021869488536155203 - 0.008863235529902197 * s
    series = -0.05396825396825397 + s * series
    series = 0.13333333333333333 + s * series
    series = -0.3333333333333333 + s * series
    small = v + v * s * series
    e = tl.exp(-2.0 * tl.abs(v))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(v) < 0.35, small, tl.where(v < 0, -large, large))


@triton.jit
def activate(gate, up, alpha, beta, limit, KIND: tl.constexpr, GATED: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """The formulas of `activations`, float32. Comparisons keep a NaN, where minimum and maximum would drop it."""
    if HAS_LIMIT:
        if GATED:
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        if KIND != "swiglu_step":
            gate = tl.where(gate > limit, limit, gate)
    if KIND == "silu":
        h = gate / (1.0 + tl.exp(-gate))
    elif KIND == "swiglu_oai":
        h = gate * _sigmoid(alpha * gate)
        up = up + beta
    elif KIND == "swiglu_step":
        h = gate / (1.0 + tl.exp(-gate))
        if HAS_LIMIT:
            h = tl.where(h > limit, limit, h)
    elif KIND == "situ":
        h = beta * _tanh(gate / beta) * _sigmoid(gate)
        up = alpha * _tanh(up / alpha)
    elif KIND == "relu2":
        h = tl.where(gate < 0, 0.0, gate)
        h = h * h
    elif KIND == "gelu_tanh":
        # 1 + tanh(z) = 2 sigmoid(2 z), without its cancellation
        h = gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        h = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return h * up if GATED else h
