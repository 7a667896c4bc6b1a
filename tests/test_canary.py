"""A backend that computes something else is found out when a layer is placed, and the next one serves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from microscale.activations import GPT_OSS
from microscale.backends import BACKENDS, emulation
from microscale.canary import Placer
from microscale.errors import NoBackendError
from microscale.machine import detect
from microscale.oracle import Backend, Problem
from microscale.quant import QuantTensor, quantize

EMULATION = BACKENDS[-1]
LINEAR = Problem("linear", "mxfp4", 160, 96)
MOE = Problem(
    "moe", "mxfp4", 96, 96, intermediate=64, experts=4, top_k=2, activation=GPT_OSS, dtype="fp32", bias=True
)


def impostor(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> Backend:
    """A backend module that is emulation but for the given functions."""
    module = ModuleType("microscale_test_impostor")
    for name in ("pack", "unpack", "linear", "moe"):
        setattr(module, name, functions.get(name, getattr(emulation, name)))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Backend("impostor", module.__name__, lambda problem: None, "almost right")


def place_linear(*backends: Backend, canary: str = "class", problem: Problem = LINEAR) -> Any:
    w = quantize(torch.randn(problem.n, problem.k), problem.weight)
    return Placer(detect(), backends, None, canary).linear(problem, w)


def place_moe(*backends: Backend, canary: str = "class") -> Any:
    w13 = quantize(torch.randn(4, 128, 96) / 8, "mxfp4")
    w2 = quantize(torch.randn(4, 96, 64) / 8, "mxfp4")
    biases = torch.randn(4, 128), torch.randn(4, 96)
    return Placer(detect(), backends, None, canary).moe(MOE, w13, w2, *biases)


def test_an_honest_backend_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for placement in (
        place_linear(impostor(monkeypatch), EMULATION),
        place_moe(impostor(monkeypatch), EMULATION),
    ):
        assert placement.choice.backend.name == "impostor"
        assert "canary passed" in placement.proof


def scaled(factor: float) -> Callable[..., torch.Tensor]:
    return lambda *a, **k: emulation.linear(*a, **k) * factor


def one_row_off(*a: Any, **k: Any) -> torch.Tensor:
    y = emulation.linear(*a, **k)
    y[:, -1] += 1
    return y


def never_written(x: torch.Tensor, *a: Any, **k: Any) -> torch.Tensor:
    return torch.full((*x.shape[:-1], 160), float("nan"), dtype=x.dtype)


@pytest.mark.parametrize("linear", [scaled(1.02), scaled(-1), scaled(0), one_row_off, never_written])
def test_a_wrong_linear_is_refused(monkeypatch: pytest.MonkeyPatch, linear: Callable[..., Any]) -> None:
    placement = place_linear(impostor(monkeypatch, linear=linear), EMULATION)
    assert placement.choice.backend.name == "emulation"
    assert dict(placement.choice.refused)["impostor"].startswith("the canary failed: its error is")


def swapped_nibbles(w: QuantTensor) -> Any:
    return emulation.pack(QuantTensor(w.format, w.shape, w.codes >> 4 | w.codes << 4, w.scales))


def scale_off_by_one(w: QuantTensor) -> Any:
    scales = w.scales.clone()
    scales[..., -1, -1] += 1
    return emulation.pack(QuantTensor(w.format, w.shape, w.codes, scales))


@pytest.mark.parametrize("pack", [swapped_nibbles, scale_off_by_one])
def test_a_wrong_layout_is_refused(monkeypatch: pytest.MonkeyPatch, pack: Callable[..., Any]) -> None:
    for place in (place_linear, place_moe):
        assert place(impostor(monkeypatch, pack=pack), EMULATION).choice.backend.name == "emulation"


def without(name: str) -> Callable[..., Any]:
    return lambda *a, **k: emulation.moe(*a, **{**k, name: None})


def other_limit(*a: Any, **k: Any) -> torch.Tensor:
    activation = type(GPT_OSS)("swiglu_oai", interleaved=True, alpha=1.702, beta=0.0, limit=7.0)
    return emulation.moe(*a[:5], activation, *a[6:], **k)


def one_expert(number: int) -> Callable[..., Any]:
    """Every route goes to this one."""
    return lambda x, ids, *a, **k: emulation.moe(x, ids.masked_fill(ids >= 0, number), *a, **k)


@pytest.mark.parametrize(
    "moe",
    [without("b13"), without("b2"), other_limit, one_expert(0), one_expert(3)],
    ids=["b13", "b2", "beta", "first expert alone", "last expert alone"],
)
def test_wrong_experts_are_refused(monkeypatch: pytest.MonkeyPatch, moe: Callable[..., Any]) -> None:
    placement = place_moe(impostor(monkeypatch, moe=moe), EMULATION)
    assert placement.choice.backend.name == "emulation"
    assert "the canary failed" in dict(placement.choice.refused)["impostor"]


def test_one_that_raises_is_refused_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(w: QuantTensor) -> Any:
        raise RuntimeError("no image for this device\nlong trace")

    why = dict(place_linear(impostor(monkeypatch, pack=pack), EMULATION).choice.refused)["impostor"]
    assert why == "it failed while the layer was placed: RuntimeError: no image for this device"


def test_with_nothing_left_all_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoBackendError, match="impostor: the canary failed"):
        place_linear(impostor(monkeypatch, linear=scaled(2)))


def test_class_proves_once_and_all_proves_each(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def linear(*a: Any, **k: Any) -> torch.Tensor:
        calls.append(1)
        return emulation.linear(*a, **k)

    backend = impostor(monkeypatch, linear=linear)
    w = quantize(torch.randn(160, 96), "mxfp4")
    for canary, count in (("class", 1), ("all", 3), ("off", 0)):
        calls.clear()
        placer = Placer(detect(), (backend, EMULATION), None, canary)
        proofs = [placer.linear(LINEAR, w).proof for _ in range(3)]
        assert len(calls) == count
        assert all(("not proved" in proof) == (canary == "off") for proof in proofs)


def test_a_failure_is_remembered_for_later_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    placer = Placer(detect(), (impostor(monkeypatch, linear=scaled(2)), EMULATION), None, "class")
    w = quantize(torch.randn(160, 96), "mxfp4")
    first, second = placer.linear(LINEAR, w), placer.linear(LINEAR, w)
    assert first.choice == second.choice
    assert second.choice.refused[0][0] == "impostor"


def test_nan_weights_are_not_a_failure() -> None:
    """A checkpoint's own NaN scale is its own: the backend must give NaN there, and does."""
    q = quantize(torch.randn(160, 96), "mxfp4")
    q.scales[3, 1] = 255
    placement = Placer(detect(), (EMULATION,), None, "all").linear(LINEAR, q)
    assert "passed" in placement.proof
