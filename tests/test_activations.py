"""The activation record, and `reference.activate` against scalar formulas in plain Python floats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from microscale.activations import GPT_OSS, KINDS, Activation
from microscale.errors import BackendError, FormatError
from microscale.reference import activate

UNGATED = ("silu", "gelu", "gelu_tanh", "relu2")
LIMITED = ("silu", "swiglu_oai", "swiglu_step")
PARAMETERS = {"swiglu_oai": (1.3, 0.25), "situ": (2.5, 1.5)}  # gpt-oss's own constants come with GPT_OSS
PLAIN = tuple(k for k in KINDS if k not in PARAMETERS)


def every_activation() -> list[Activation]:
    found = []
    for kind in KINDS:
        alpha, beta = PARAMETERS.get(kind, (1.0, 0.0))
        shapes = [(True, False), (True, True)] + ([(False, False)] if kind in UNGATED else [])
        limits = (None, 0.7, 7.0) if kind in LIMITED else (None,)
        for (gated, interleaved), limit in itertools.product(shapes, limits):
            found.append(Activation(kind, gated, interleaved, alpha, beta, limit))
    return [*found, GPT_OSS]


def name(a: Activation) -> str:
    layout = "plain" if not a.gated else "interleaved" if a.interleaved else "halves"
    return f"{a.kind}-{layout}-{a.limit}"


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def scalar(a: Activation, g: float, u: float) -> float:
    """One gate and one up, as the comment in activations.py has it."""
    limit = math.inf if a.limit is None else a.limit
    if not a.gated:
        u = 1.0
    elif a.kind in LIMITED:
        u = max(-limit, min(u, limit))
    if a.kind == "silu":
        g = min(g, limit)
        return g * sigmoid(g) * u
    if a.kind == "swiglu_oai":
        g = min(g, limit)
        return g * sigmoid(a.alpha * g) * (u + a.beta)
    if a.kind == "swiglu_step":
        return min(g * sigmoid(g), limit) * u
    if a.kind == "situ":
        return a.beta * math.tanh(g / a.beta) * sigmoid(g) * a.alpha * math.tanh(u / a.alpha)
    if a.kind == "gelu":
        return 0.5 * g * (1 + math.erf(g / math.sqrt(2))) * u
    if a.kind == "gelu_tanh":
        return 0.5 * g * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u
    assert a.kind == "relu2"
    return max(g, 0.0) ** 2 * u


def lay_out(a: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if not a.gated:
        return gate
    return torch.stack((gate, up), -1).flatten(-2) if a.interleaved else torch.cat((gate, up), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("a", every_activation(), ids=name)
def test_against_scalar_python(a: Activation, dtype: torch.dtype) -> None:
    edges = [0.0, -0.0, 0.7, 7.0, 0.7 + 1e-6, 7.0 - 1e-6, 1e-30, 50.0]
    edges = torch.tensor(edges + [-e for e in edges], dtype=dtype)
    gate = torch.cat((torch.randn(200, dtype=dtype) * torch.tensor([0.1, 1, 5, 20]).repeat(50), edges))
    up = torch.cat((torch.randn(200, dtype=dtype) * 5, edges[torch.randperm(len(edges))]))
    got = activate(lay_out(a, gate, up)[None, None], a)
    assert got.dtype == dtype
    assert got.shape == (1, 1, len(gate))
    for y, g, u in zip(got.flatten().tolist(), gate.tolist(), up.tolist(), strict=True):
        # Each formula is under 8 roundings, and one for the argument of exp, tanh or erf: its condition is
        # below 1 relative to `size`, the formula with its sigmoid (or 1 + erf) replaced by 1.
        size = (g * g if a.kind == "relu2" else abs(g)) * (abs(u) + abs(a.beta) if a.gated else 1)
        bound = 9 * torch.finfo(dtype).eps * size + torch.finfo(dtype).smallest_normal
        assert abs(y - scalar(a, g, u)) <= bound, (g, u)


@pytest.mark.parametrize("a", [a for a in every_activation() if a.limit is not None], ids=name)
def test_the_limit_is_seen(a: Activation) -> None:
    assert a.limit is not None
    far, beyond = 3 * a.limit + 3, 30 * a.limit + 30
    h = lay_out(a, torch.tensor([far], dtype=torch.float64), torch.tensor([beyond], dtype=torch.float64))
    unlimited = Activation(a.kind, a.gated, a.interleaved, a.alpha, a.beta)
    assert abs(activate(h, unlimited)) > 2 * abs(activate(h, a))
    more = lay_out(
        a, torch.tensor([far + 90], dtype=torch.float64), torch.tensor([beyond + 9], dtype=torch.float64)
    )
    assert torch.equal(activate(more, a), activate(h, a)), "nothing moves past the limit"
    if a.gated:
        low = lay_out(
            a, torch.tensor([far], dtype=torch.float64), -torch.tensor([beyond], dtype=torch.float64)
        )
        assert activate(low, a) == scalar(a, far, -a.limit), "the up half is bounded from below too"
    down = lay_out(a, torch.tensor([-30.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    assert activate(down, a).abs() < 1e-9, "the gate is not bounded from below"


def test_gpt_oss_constants() -> None:
    assert Activation("swiglu_oai", True, True, 1.702, 1.0, 7.0) == GPT_OSS
    h = torch.tensor([100.0, -100.0, 1.0, 0.5], dtype=torch.float64)  # gate, up, gate, up
    expected = [7 * sigmoid(1.702 * 7) * (-7 + 1), sigmoid(1.702) * 1.5]
    torch.testing.assert_close(activate(h, GPT_OSS).tolist(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("a", every_activation(), ids=name)
def test_nan_passes_and_stays_in_its_column(a: Activation) -> None:
    for place in ("gate", "up") if a.gated else ("gate",):
        gate, up = torch.randn(2, 5), torch.randn(2, 5)
        clean = activate(lay_out(a, gate, up), a)
        (gate if place == "gate" else up)[1, 3] = math.nan
        dirty = activate(lay_out(a, gate, up), a)
        assert dirty[1, 3].isnan()
        dirty[1, 3] = clean[1, 3]
        assert not dirty.isnan().any()


@pytest.mark.parametrize("a", every_activation(), ids=name)
def test_infinities(a: Activation) -> None:
    """+inf in the gate is clamped, or stays infinite where nothing bounds it; never NaN."""
    gate, up = torch.full((1,), math.inf), torch.full((1,), 0.5)
    y = activate(lay_out(a, gate, up), a)
    finite = a.limit is not None or a.kind == "situ"
    assert y.isfinite().item() is finite
    assert y > 0


@pytest.mark.parametrize("a", every_activation(), ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_shapes_and_dtypes(a: Activation, dtype: torch.dtype) -> None:
    for lead in ((), (0,), (3,), (2, 0, 3)):
        for intermediate in (0, 1, 7):
            h = torch.randn(*lead, a.rows(intermediate)).to(dtype)
            before = h.clone()
            y = activate(h, a)
            assert y.shape == (*lead, intermediate)
            assert y.dtype == dtype
            assert torch.equal(h, before), "the argument is not written to"


def test_halves_and_interleaved_are_the_same_numbers() -> None:
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    for a in every_activation():
        if a.gated and not a.interleaved:
            b = Activation(a.kind, True, True, a.alpha, a.beta, a.limit)
            # Not bit for bit: vectorised exp and its scalar tail, or strided path, may differ by an ulp.
            size = (gate.square() if a.kind == "relu2" else gate.abs()) * (up.abs() + abs(a.beta))
            error = activate(lay_out(a, gate, up), a) - activate(lay_out(b, gate, up), b)
            assert (error.abs() <= 18 * torch.finfo(torch.float32).eps * size).all(), a


def test_odd_rows() -> None:
    with pytest.raises(BackendError, match="even number of rows, found 7"):
        activate(torch.zeros(2, 7), Activation("silu"))
    assert activate(torch.zeros(2, 7), Activation("silu", gated=False)).shape == (2, 7)


def test_rows() -> None:
    assert Activation("silu").rows(5) == 10
    assert Activation("silu", gated=False).rows(5) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "swish"}, r"unknown activation 'swish'; known: silu, swiglu_oai"),
        *[({"kind": k, "alpha": 1.7}, rf"{k} has no alpha or beta \(got 1.7, 0.0\)") for k in PLAIN],
        *[({"kind": k, "beta": 1.0}, rf"{k} has no alpha or beta \(got 1.0, 1.0\)") for k in PLAIN],
        ({"kind": "situ"}, "neither may be 0"),
        ({"kind": "situ", "alpha": 0.0, "beta": 1.0}, "neither may be 0"),
        *[({"kind": k, "limit": 7.0}, rf"{k} cannot take limit 7.0") for k in ("gelu", "gelu_tanh", "relu2")],
        ({"kind": "situ", "beta": 1.0, "limit": 7.0}, "situ cannot take limit 7.0"),
        *[({"kind": "silu", "limit": v}, rf"silu cannot take limit {v}") for v in (0.0, -1.0, math.nan)],
        ({"kind": "silu", "gated": False, "interleaved": True}, "nothing to interleave"),
        ({"kind": "swiglu_oai", "gated": False}, "swiglu_oai needs a gate"),
        ({"kind": "swiglu_step", "gated": False}, "swiglu_step needs a gate"),
        ({"kind": "situ", "beta": 1.0, "gated": False}, "situ needs a gate"),
    ],
)
def test_what_the_record_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Activation(**arguments)  # type: ignore[arg-type]
