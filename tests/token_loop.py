"""A second opinion on `reference`: loops over tokens in float64 that share no code with it.

`looped` also says how far rounding may carry a correct result; every bound of the tests comes from it.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.formats import FORMATS, FP8_GROUP128, Format
from microscale.quant import QuantTensor, dequantize, quantize
from microscale.reference import moe

ALL = tuple(FORMATS)
ACTS = (*(f for f in FORMATS.values() if f.block[0] == 1), FP8_GROUP128)
SILU = Activation("silu")
RELU2 = Activation("relu2")
ACTIVATIONS = (
    SILU,
    Activation("silu", gated=False),
    Activation("silu", limit=0.6),
    Activation("silu", interleaved=True, limit=0.6),
    GPT_OSS,
    replace(GPT_OSS, alpha=1.3, beta=0.25, limit=0.6, interleaved=False),
    Activation("swiglu_step", limit=0.4),
    Activation("situ", alpha=2.5, beta=1.5),
    Activation("gelu"),
    Activation("gelu_tanh", gated=False),
    Activation("relu2", interleaved=True),
    Activation("relu2", gated=False),
)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def split(h: Tensor, a: Activation) -> tuple[Tensor, Tensor | None]:
    if not a.gated:
        return h, None
    pairs = h.reshape(-1, 2).T if a.interleaved else h.reshape(2, -1)
    return pairs[0], pairs[1]


def formula(h: Tensor, a: Activation) -> Tensor:
    """float64 [rows] -> [I]."""
    g, u = split(h, a)
    limit = torch.tensor(torch.inf if a.limit is None else a.limit, dtype=torch.float64)
    if a.kind in ("silu", "swiglu_oai"):
        g = torch.minimum(g, limit)
    if u is None:
        u = torch.ones_like(g)
    elif a.kind in ("silu", "swiglu_oai", "swiglu_step"):
        u = torch.maximum(-limit, torch.minimum(u, limit))
    silu = g / (1 + torch.exp(-g))
    bell = {
        "silu": silu,
        "swiglu_oai": g / (1 + torch.exp(-a.alpha * g)),
        "swiglu_step": torch.minimum(silu, limit),
        "situ": a.beta * torch.tanh(g / a.beta) / (1 + torch.exp(-g)),
        "gelu": g * torch.special.ndtr(g),
        "gelu_tanh": g / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))),
        "relu2": torch.where(g > 0, g * g, 0.0),
    }[a.kind]
    if a.kind == "swiglu_oai":
        u = u + a.beta
    return bell * (a.alpha * torch.tanh(u / a.alpha) if a.kind == "situ" else u)


def formula_error(h: Tensor, dh: Tensor, a: Activation) -> Tensor:
    """What `dh`, and the formula's own roundings per eps, can do to it. Clamps never widen a difference.

    But for relu2, |phi(g)| <= |g| and |phi'| <= 1.25 (1.23 at most: situ); the up factor is at most
    |u| + |beta|, its slope 1; each formula is under 9 roundings of that size (see test_activations).
    """
    g, u = split(h, a)
    dg, du = split(dh, a)
    size, slope = (g.square(), 2 * g.abs()) if a.kind == "relu2" else (g.abs(), torch.full_like(g, 1.25))
    if u is None or du is None:
        return slope * dg + 9 * size
    factor = u.abs() + abs(a.beta)
    return slope * factor * dg + size * du + 9 * size * factor


def looped(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    a: Activation,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    expert_map: Tensor | None = None,
    weight_on_input: bool = False,
    act: Format | None = None,
) -> tuple[Tensor, Tensor]:
    """The result in float64, and its first-order rounding bound per eps.

    A K-term product loses at most K eps of the sum of its magnitudes, in any order; 4 more are for the bias
    and for rounding weight, input and result.
    """
    x, weights, w13, w2 = x.double(), weights.double(), w13.double(), w2.double()
    y, bound = (
        torch.zeros(len(x), w2.shape[1], dtype=torch.float64),
        torch.zeros(len(x), w2.shape[1]).double(),
    )
    for m, t in itertools.product(range(len(x)), range(ids.shape[1])):
        e = int(ids[m, t])
        if e >= 0 and expert_map is not None:
            e = int(expert_map[e])
        if e < 0:
            continue
        weight = float(weights[m, t])
        row = stored_row(x[m] * weight if weight_on_input else x[m], act)
        after = 1.0 if weight_on_input else weight
        h = torch.einsum("nk,k->n", w13[e], row)
        dh = (len(row) + 4) * torch.einsum("nk,k->n", w13[e].abs(), row.abs())
        if b13 is not None:
            h, dh = h + b13[e], dh + 4 * b13[e].abs()
        middle = formula(h, a)
        error = formula_error(h, dh, a) if act is None else torch.zeros_like(middle)
        middle = stored_row(middle, act)
        out = torch.einsum("nk,k->n", w2[e], middle)
        d = torch.einsum("nk,k->n", w2[e].abs(), error + (len(middle) + 4) * middle.abs())
        if b2 is not None:
            out, d = out + b2[e], d + 4 * b2[e].abs()
        y[m] += after * out
        bound[m] += abs(after) * (d + (2 + ids.shape[1]) * out.abs())
    return y, bound


def stored_row(row: Tensor, act: Format | None) -> Tensor:
    """A single vector through a format: nothing else can share its scales."""
    return row if act is None else dequantize(quantize(row, act), torch.float64)


def assert_within(got: Tensor, expected: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    """`got` computed in `dtype`, `expected` in float64. 1 % is for second-order terms, 100 subnormals for
    underflow.
    """
    assert got.dtype == dtype
    assert got.shape == expected.shape
    allowed = 1.01 * (eps(dtype) + eps(torch.float64)) * bound + 100 * 2.0**-149
    error = (got.double() - expected).abs()
    assert (error <= allowed).all(), f"worst {(error / allowed).max()} of the bound"


def operands(
    fmt: str = "mxfp4",
    a: Activation = SILU,
    *,
    m: int = 9,
    t: int = 3,
    e: int = 5,
    h: int = 40,
    i: int = 24,
    n: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of `moe`, by name. h and i are no multiples of a block; ids of a row differ where t <= e."""
    scores = torch.rand(m, e)
    return {
        "x": torch.randn(m, h).to(dtype),
        "topk_ids": scores.topk(t, dim=1).indices if t <= e else torch.randint(0, e, (m, t)),
        "topk_weights": torch.rand(m, t) + 0.1,
        "w13": quantize(torch.randn(e, a.rows(i), h) / h**0.5, fmt),
        "w2": quantize(torch.randn(e, n or h, i) / i**0.5, fmt),
        "activation": a,
        "b13": torch.randn(e, a.rows(i)),
        "b2": torch.randn(e, n or h),
    }


def expected_of(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    given = {k: v for k, v in args.items() if k not in ("w13", "w2", "activation", "dtype")}
    w13, w2 = (dequantize(args[k], torch.float64) for k in ("w13", "w2"))
    given["ids"], given["weights"] = given.pop("topk_ids"), given.pop("topk_weights")
    return looped(w13=w13, w2=w2, a=args["activation"], **given)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def small_mxfp4(*shape: int) -> tuple[QuantTensor, Tensor]:
    """Random codes, scales 1 or 2, and the same numbers written out by hand."""
    *lead, n, k = shape
    nibbles = torch.randint(0, 16, shape)
    exponents = torch.randint(0, 2, (*lead, n, -(-k // 32)))
    values = (
        E2M1[nibbles & 7] * (1 - 2 * (nibbles >> 3)) * 2.0 ** exponents.repeat_interleave(32, -1)[..., :k]
    )
    padded = torch.nn.functional.pad(nibbles, (0, k % 2))
    codes = (padded[..., 0::2] | padded[..., 1::2] << 4).to(torch.uint8)
    return QuantTensor(FORMATS["mxfp4"], shape, codes, (exponents + 127).to(torch.uint8)), values


def exact_operands(a: Activation = RELU2, *, m: int = 9, t: int = 3, e: int = 5) -> dict[str, Any]:
    """Operands on which `moe` is exact in float64 in any order: small multiples of powers of two, and relu2.

    In units of the last place: |h| < 2^11 (40 * 2 * 12, in halves), relu2(g) * u < 2^33, 24 terms times
    w2 < 2^43, 7 terms times weights in eighths < 2^49.
    """
    h, i = 40, 24
    w13, dense13 = small_mxfp4(e, a.rows(i), h)
    w2, dense2 = small_mxfp4(e, h, i)
    return {
        "x": torch.randint(-2, 3, (m, h)).float(),
        "topk_ids": torch.rand(m, e).topk(t, dim=1).indices if t <= e else torch.randint(0, e, (m, t)),
        "topk_weights": torch.randint(1, 8, (m, t)) / 8,
        "w13": w13,
        "w2": w2,
        "activation": a,
        "b13": torch.randint(-8, 9, (e, a.rows(i))) / 2,
        "b2": torch.randint(-8, 9, (e, h)) / 2,
        "dense": (dense13, dense2),
        "dtype": torch.float64,
    }


def run(args: dict[str, Any]) -> Tensor:
    return moe(**{k: v for k, v in args.items() if k != "dense"})


def run_loop(args: dict[str, Any]) -> Tensor:
    given = {k: v for k, v in args.items() if k not in ("w13", "w2", "activation", "dense", "dtype")}
    given["ids"], given["weights"] = given.pop("topk_ids"), given.pop("topk_weights")
    w13, w2 = args["dense"]
    return looped(w13=w13, w2=w2, a=args["activation"], **given)[0]
