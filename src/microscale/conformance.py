"""The one suite that every backend must pass: cases as data, and the function that runs one.

`tests/test_conformance.py` and `microscale selftest` both walk `cases()`. A case that a backend refuses is skipped
with the backend's own sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microscale.accumulation import FLOAT32, Accumulation
from microscale.activations import GPT_OSS, Activation
from microscale.backends import pack
from microscale.backends.contract import Contract
from microscale.canary import DTYPE_WORDS
from microscale.formats import FORMATS, Format, activation_format, activation_word
from microscale.machine import Machine
from microscale.oracle import Problem
from microscale.quant import QuantTensor, quantize
from microscale.tolerance import Budget, linear_budget, moe_budget

SILU = Activation("silu")
ACTIVATIONS = (
    SILU,
    Activation("silu", limit=1.0),
    GPT_OSS,
    Activation("swiglu_oai", alpha=1.3, beta=0.5, limit=2.0),
    Activation("swiglu_step", limit=1.0),
    Activation("situ", alpha=25.0, beta=4.0),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu2"),
    Activation("silu", gated=False),
    Activation("relu2", gated=False),
    Activation("gelu_tanh", gated=False),
)


@dataclass(frozen=True)
class Case:
    """One call to check.

    Attributes:
        n, k: output and input features (linear), or intermediate and hidden size (MoE).
        experts: 0 for a linear. `top_k`, `activation` and the flags below it: MoE only.
        mapped: an expert map that holds every second expert elsewhere.
        padded: some routes are -1.
        crowded: all tokens go to one expert.
    """

    op: str
    weight: str
    m: int
    n: int
    k: int
    act: str = "a16"
    dtype: torch.dtype = torch.bfloat16
    bias: bool = True
    experts: int = 0
    top_k: int = 0
    activation: Activation | None = None
    mapped: bool = False
    padded: bool = False
    crowded: bool = False
    weight_on_input: bool = False

    @property
    def name(self) -> str:
        """What a test report calls it."""
        words = [self.op, self.weight, self.act, DTYPE_WORDS[self.dtype], f"M{self.m}"]
        if self.activation is None:
            words += [f"N{self.n}", f"K{self.k}"]
        else:
            a = self.activation
            words += [f"E{self.experts}", f"T{self.top_k}", f"H{self.k}", f"I{self.n}", a.kind]
            words += [w for w, on in (("ungated", not a.gated), ("interleaved", a.interleaved)) if on]
            words += [] if a.limit is None else [f"limit{a.limit:g}"]
        flags = ("bias", "mapped", "padded", "crowded", "weight_on_input")
        return "-".join(words + [flag for flag in flags if getattr(self, flag)])

    def problem(self, machine: Machine, device: str) -> Problem:
        """What the oracle is asked for this case."""
        fmt = activation_format(self.weight, self.act)
        return Problem(
            op=self.op,
            weight=self.weight,
            n=self.k if self.activation else self.n,
            k=self.k,
            act=activation_word(fmt),
            dtype=DTYPE_WORDS[self.dtype],
            intermediate=self.n if self.activation else 0,
            experts=self.experts,
            top_k=self.top_k,
            activation=self.activation,
            bias=self.bias,
        ).on(machine, device)


def cases(large: bool = False) -> Iterator[Case]:
    """Every format on every edge shape, then every option once.

    Args:
        large: also one shape of a real model per format.
    """
    linear_shapes = [
        (0, 32, 64),
        (1, 1, 32),
        (1, 31, 64),
        (3, 33, 96),
        (5, 128, 128),
        (2, 130, 288),
        (33, 64, 2880),
    ]
    linear_shapes += [(4, 2880, 2880)] if large else []
    moe_shapes = [(0, 32, 64, 4, 2), (1, 32, 64, 4, 1), (7, 96, 128, 8, 3), (3, 32, 288, 5, 5)]
    moe_shapes += [(4, 2880, 2880, 4, 2)] if large else []
    for name in FORMATS:
        for m, n, k in linear_shapes:
            yield Case("linear", name, m, n, k)
        for m, i, h, e, t in moe_shapes:
            yield Case("moe", name, m, i, h, experts=e, top_k=t, activation=SILU)
        yield Case("linear", name, 5, 256, 384, bias=False)
        yield Case("moe", name, 9, 128, 256, experts=8, top_k=3, activation=SILU, bias=False)
        for act in ("a8", "a6", "a4"):
            yield Case("linear", name, 5, 128, 256, act=act)
            yield Case("moe", name, 5, 128, 256, act=act, experts=4, top_k=2, activation=GPT_OSS)
            plain: dict[str, Any] = {"act": act, "bias": False}
            yield Case("linear", name, 1, 384, 512, **plain)
            yield Case(
                "moe",
                name,
                7,
                128,
                256,
                experts=4,
                top_k=3,
                activation=SILU,
                padded=True,
                mapped=True,
                **plain,
            )
    for dtype in (torch.float16, torch.float32):
        yield Case("linear", "mxfp4", 3, 64, 96, dtype=dtype)
        yield Case("moe", "nvfp4", 3, 64, 96, dtype=dtype, experts=4, top_k=2, activation=GPT_OSS)
    yield Case("linear", "mxfp4", 3, 64, 96, bias=False)
    base: dict[str, Any] = {"m": 9, "n": 64, "k": 96, "experts": 8, "top_k": 4}
    for activation in ACTIVATIONS:
        yield Case("moe", "mxfp4", **base, activation=activation)
    for flag in ("mapped", "padded", "crowded"):
        yield Case("moe", "mxfp4", **base | {flag: True}, activation=GPT_OSS)
    yield Case("moe", "mxfp4", **base, activation=GPT_OSS, bias=False)
    yield Case("moe", "mxfp4", 9, 64, 96, experts=8, top_k=1, activation=SILU, weight_on_input=True)


def run(
    case: Case,
    backend: Contract,
    device: str,
    generator: torch.Generator,
    accumulation: Accumulation = FLOAT32,
) -> float:
    """Pack random weights, run the backend, compare with float64.

    Args:
        accumulation: how the backend's hardware adds up products: `Backend.accumulation` of the case's problem.
    Returns:
        The largest error as a fraction of the permitted one; infinity for an unexpected NaN or a value never written.
    Raises:
        AssertionError: unpack(pack(w)) is not w, or the result has the wrong shape or dtype.
    """
    act = activation_format(case.weight, case.act)
    x = _random((case.m, case.k), generator, device, case.dtype)
    if case.activation is None:
        w = _weight(case, (case.n, case.k), generator, device)
        bias = _random((case.n,), generator, device, case.dtype) if case.bias else None
        packed = _packed(backend, w, act)
        y = backend.linear(x, packed, bias, act=act)
        return _compare(y, linear_budget(x, w, bias, act, accumulation=accumulation), case)
    rows = case.activation.rows(case.n)
    w13 = _weight(case, (case.experts, rows, case.k), generator, device)
    w2 = _weight(case, (case.experts, case.k, case.n), generator, device)
    options: dict[str, Any] = {"act": act, "weight_on_input": case.weight_on_input}
    if case.bias:
        options["b13"] = _random((case.experts, rows), generator, device, case.dtype)
        options["b2"] = _random((case.experts, case.k), generator, device, case.dtype)
    ids, weights = _routes(case, generator)
    if case.mapped:
        # Twice as many experts exist; the odd ones are elsewhere, and ours are in reverse order.
        expert_map = torch.full((2 * case.experts,), -1)
        expert_map[::2] = torch.arange(case.experts).flip(0)
        options["expert_map"] = expert_map.to(device)
    ids, weights = ids.to(device), weights.to(device)
    packed13, packed2 = _packed(backend, w13, act), _packed(backend, w2, act)
    y = backend.moe(x, ids, weights, packed13, packed2, case.activation, **options)
    options["accumulation"] = accumulation
    return _compare(y, moe_budget(x, ids, weights, w13, w2, case.activation, **options), case)


def _routes(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    total = 2 * case.experts if case.mapped else case.experts
    scores = torch.rand(case.m, total, generator=generator)
    ids = scores.argsort(dim=-1)[:, : case.top_k]
    if case.crowded:
        ids = torch.full_like(ids, total - 1)
    if case.padded:
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -1)
    return ids, torch.rand(ids.shape, generator=generator) + 0.1


def _weight(case: Case, shape: tuple[int, ...], generator: torch.Generator, device: str) -> QuantTensor:
    # Rows of very different size: a scale applied to the wrong block or row cannot go unnoticed.
    size = torch.exp2(torch.randint(-3, 4, (*shape[:-1], 1), generator=generator).float())
    w = torch.randn(shape, generator=generator) * size / shape[-1] ** 0.5
    return quantize(w, case.weight).to(device)


def _random(shape: tuple[int, ...], generator: torch.Generator, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def _packed(backend: Contract, w: QuantTensor, act: Format | None) -> Any:
    packed = pack(backend, w, act)
    back = backend.unpack(packed)
    same = back.shape == w.shape and torch.equal(back.codes, w.codes) and torch.equal(back.scales, w.scales)
    if w.tensor_scale is not None and back.tensor_scale is not None:
        same = same and torch.equal(
            back.tensor_scale.expand(w.shape[:-1]), w.tensor_scale.expand(w.shape[:-1])
        )
    assert same, "unpack(pack(w)) is not w"
    return packed


def _compare(y: Tensor, budget: Budget, case: Case) -> float:
    assert y.shape == budget.expected.shape, (
        f"shape {tuple(y.shape)}, expected {tuple(budget.expected.shape)}"
    )
    assert y.dtype == case.dtype, f"dtype {y.dtype}, expected {case.dtype}"
    return budget.worst(y)
