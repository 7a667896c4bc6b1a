"""Layers on a backend that repacks, and fixtures for them, which `conftest` has."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microscale.activations import Activation
from microscale.backends import emulation
from microscale.canary import Placer
from microscale.experts_host import ExpertsHost
from microscale.formats import FORMATS
from microscale.machine import detect
from microscale.nn import QuantLinear
from microscale.oracle import Backend
from microscale.quant import QuantTensor, quantize
from microscale.quant_experts import QuantExperts

N, K = 48, 64


def cloned(w: QuantTensor) -> QuantTensor:
    return QuantTensor(w.format, w.shape, w.codes.clone(), w.scales.clone(), w.tensor_scale, w.rule)


def refuse_nothing(problem: Any) -> str | None:
    return None


EMULATION = Backend("emulation", "microscale.backends.emulation", refuse_nothing, "slow")
REPACKER = Backend("repacker", "repacker_for_tests", refuse_nothing, "copies")


@pytest.fixture
def repacker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulation that copies: what holds for it holds for the C++ core, on any machine."""
    module: Any = ModuleType(REPACKER.module)
    module.REPACKS = True
    module.pack = lambda w: emulation.Packed(cloned(w))
    module.unpack = lambda packed: cloned(packed.weight)
    module.linear, module.moe = emulation.linear, emulation.moe
    monkeypatch.setitem(sys.modules, REPACKER.module, module)


@pytest.fixture(params=["repacker", "cpu"])
def placer(request: pytest.FixtureRequest, repacker: None) -> Iterator[Placer]:
    """By a backend that holds weights in a form of its own."""
    if request.param == "repacker":
        yield Placer(detect(), (REPACKER,))
    else:
        if not detect().core:
            pytest.skip(f"the C++ core is not in this installation: {detect().core_missing}")
        yield Placer(force="cpu")


@pytest.fixture(params=["held", "aliased"])
def either(request: pytest.FixtureRequest, placer: Placer) -> Placer:
    """A backend that empties the buffers, and one whose packed form they are."""
    return placer if request.param == "held" else Placer(detect(), (EMULATION,))


def layer(placer: Placer, name: str = "mxfp4") -> tuple[QuantLinear, QuantTensor]:
    w = quantize(torch.randn(N, K), name)
    return QuantLinear(cloned(w), torch.randn(N), placer), w


def assert_same(found: QuantTensor, wanted: QuantTensor) -> None:
    assert (found.format, found.shape, found.rule) == (wanted.format, wanted.shape, wanted.rule)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)
    assert (found.tensor_scale is None) == (wanted.tensor_scale is None)
    if wanted.tensor_scale is not None:
        assert torch.equal(found.tensor_scale, wanted.tensor_scale)


class Host(nn.Module):
    """Experts as some host model stores them."""

    def __init__(self, w13: QuantTensor, w2: QuantTensor) -> None:
        super().__init__()
        self.shapes = w13.shape, w2.shape
        for name, w in (("first", w13), ("second", w2)):
            self.register_parameter(f"{name}_codes", nn.Parameter(w.codes, requires_grad=False))
            self.register_buffer(f"{name}_scales", w.scales)
        self.bias = nn.Parameter(torch.randn(4, 64).bfloat16())

    def forward(self, *args: Tensor) -> Tensor:
        """What the experts compute."""
        y: Tensor = self.microscale(*args)
        return y


def read(module: Any) -> tuple[QuantTensor, QuantTensor]:
    fmt = FORMATS["mxfp4"]
    return (
        QuantTensor(fmt, module.shapes[0], module.first_codes.detach(), module.first_scales),
        QuantTensor(fmt, module.shapes[1], module.second_codes.detach(), module.second_scales),
    )


def biases(module: Any) -> tuple[Tensor | None, Tensor | None]:
    return module.bias, None


def parts(module: Any, w13: QuantTensor, w2: QuantTensor) -> dict[str, Tensor]:
    both = (("first", w13), ("second", w2))
    return {f"{name}_{part}": getattr(w, part) for name, w in both for part in ("codes", "scales")}


HOST = ExpertsHost(read, biases, parts)


def experts(placer: Placer) -> tuple[Host, tuple[QuantTensor, QuantTensor]]:
    weights = quantize(torch.randn(4, 64, 64), "mxfp4"), quantize(torch.randn(4, 64, 32), "mxfp4")
    host = Host(*map(cloned, weights))
    runner = QuantExperts(host, HOST, Activation("silu"), 2, placer)
    object.__setattr__(host, "microscale", runner)
    return host, weights


def routed() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(5, 64), torch.randint(4, (5, 2)), torch.rand(5, 2)
