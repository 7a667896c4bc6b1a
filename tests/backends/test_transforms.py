"""What a kernel cannot see in a tensor's memory: signs still to be turned, tangents, transforms, second gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from microscale import reference
from microscale.activations import GPT_OSS
from microscale.backends import emulation
from microscale.canary import Placer
from microscale.dense import DenseLinear, place_dense
from microscale.formats import get_format
from microscale.nn import QuantLinear
from microscale.quant import dequantize, quantize


def lazily_negated(t: torch.Tensor) -> torch.Tensor:
    """-t, as torch has it behind `z.conj().imag`: t's memory, and a note."""
    negated = torch.complex(torch.zeros_like(t), t).conj().imag
    assert negated.is_neg()
    return negated


def test_a_sign_that_is_still_to_be_turned(cpu: Any) -> None:
    q = quantize(torch.randn(24, 64), "nvfp4")
    w, x, bias = cpu.pack(q), torch.randn(5, 64), torch.randn(24)
    wanted = cpu.linear(-x, w, -bias)
    assert torch.equal(cpu.linear(torch._neg_view(x), w, torch._neg_view(bias)), wanted)
    assert torch.equal(cpu.linear(lazily_negated(x), w, lazily_negated(bias)), wanted)
    w13, w2 = (cpu.pack(quantize(torch.randn(4, n, 64), "mxfp4")) for n in (128, 64))
    ids, weights = torch.randint(4, (5, 2)), torch.rand(5, 2)
    b13, b2 = torch.randn(4, 128), torch.randn(4, 64)
    wanted = cpu.moe(-x, ids, -weights, w13, w2, GPT_OSS, b13=-b13, b2=-b2)
    x, weights, b13, b2 = map(torch._neg_view, (x, weights, b13, b2))
    assert torch.equal(cpu.moe(x, ids, weights, w13, w2, GPT_OSS, b13=b13, b2=b2), wanted)


def test_a_sign_that_is_still_to_be_turned_before_dense_weights(cpu: Any) -> None:
    layer = nn.Linear(96, 40, dtype=torch.bfloat16)
    placer = Placer()
    place_dense(layer, DenseLinear, torch.bfloat16, placer)
    x = torch.randn(1, 96).bfloat16()
    with torch.no_grad():
        y = layer(torch._neg_view(x))
        assert torch.equal(y, F.linear(-x, layer.weight, layer.bias))


def test_tangents_of_forward_mode(cpu: Any) -> None:
    q = quantize(torch.randn(24, 64), "nvfp4")
    w, x, direction = cpu.pack(q), torch.randn(5, 64), torch.randn(5, 64)
    with forward_ad.dual_level():
        y = cpu.linear(forward_ad.make_dual(x, direction), w)
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, direction @ dequantize(q).T, rtol=1e-4, atol=1e-4)


def test_vmap(cpu: Any) -> None:
    q = quantize(torch.randn(24, 64), "nvfp4")
    w, x = cpu.pack(q), torch.randn(5, 3, 64)
    found = torch.vmap(lambda rows: cpu.linear(rows, w))(x)
    torch.testing.assert_close(found, reference.linear(x, q), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("placed", [True, False])
def test_transforms_of_a_layer(cpu: Any, placed: bool) -> None:
    """The first call places it, where a transform wraps the memory that tensors are made in."""
    q, x, direction = quantize(torch.randn(24, 64), "nvfp4"), torch.randn(5, 64), torch.randn(5, 64)
    wanted = dequantize(q)
    transforms = {
        "grad": lambda f: torch.func.grad(lambda rows: f(rows).sum())(x) - wanted.sum(dim=0),
        "vmap": lambda f: torch.func.vmap(f)(x) - x @ wanted.T,
        "jacrev": lambda f: torch.func.jacrev(f)(x[0]) - wanted,
        "jacfwd": lambda f: torch.func.jacfwd(f)(x[0]) - wanted,
        "jvp": lambda f: torch.func.jvp(f, (x,), (direction,))[1] - direction @ wanted.T,
        "hessian": lambda f: (
            torch.func.hessian(lambda row: f(row).square().sum())(x[0]) - 2 * wanted.T @ wanted
        ),
        "functionalize": lambda f: torch.func.functionalize(f)(x) - x @ wanted.T,
    }
    for name, wrong in transforms.items():
        layer = QuantLinear(q, None, Placer(force="cpu"))
        if placed:
            layer(x)
        assert wrong(layer).abs().max() < 1e-3, name
        assert torch.equal(layer(x), cpu.linear(x, cpu.pack(q))), name


def test_gradients_of_experts_by_a_transform(cpu: Any) -> None:
    w13, w2 = (quantize(torch.randn(4, n, 64), "mxfp4") for n in (128, 64))
    ids, weights = torch.randint(4, (5, 2)), torch.rand(5, 2)

    def gradients(backend: Any) -> Any:
        packed = backend.pack(w13), backend.pack(w2)
        wanted = torch.func.grad(
            lambda x, weights: backend.moe(x, ids, weights, *packed, GPT_OSS).sum(), argnums=(0, 1)
        )
        return wanted(x, weights)

    x = torch.randn(5, 64)
    for found, wanted in zip(gradients(cpu), gradients(emulation), strict=True):
        assert torch.equal(found, wanted)


def test_a_gradient_of_a_gradient_is_refused_and_not_left_out(cpu: Any) -> None:
    w, x = cpu.pack(quantize(torch.randn(24, 64), "nvfp4")), torch.randn(5, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cpu.linear(x, w).square().sum(), x, create_graph=True)
    penalty = gradient.square().sum() + x.sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty.backward()


@pytest.mark.parametrize("name", ["cpu", "emulation"])
def test_autocast_rounds_no_operand(cpu: Any, name: str) -> None:
    q, x, direction = quantize(torch.randn(24, 64), "nvfp4"), torch.randn(5, 64), torch.randn(5, 24)
    backend = {"cpu": cpu, "emulation": emulation}[name]
    w13, w2 = (backend.pack(quantize(torch.randn(4, n, 64), "mxfp4")) for n in (128, 64))
    ids, weights, leaf = torch.randint(4, (5, 2)), torch.rand(5, 2), x.clone().requires_grad_()

    def computed() -> list[torch.Tensor]:
        layer = QuantLinear(q, None, Placer(force=name))  # proved where it is called
        y, routed = layer(x), backend.moe(x, ids, weights, w13, w2, GPT_OSS)
        return [y, routed, *torch.autograd.grad(cpu.linear(leaf, cpu.pack(q)), leaf, direction)]

    wanted = computed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = computed()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("act", ["mxfp8_e4m3", "nvfp4", "fp8_group128"])
def test_gradients_pass_through_quantised_activations(act: str) -> None:
    q, x, direction = quantize(torch.randn(24, 64), "mxfp4"), torch.randn(5, 64), torch.randn(5, 24)
    how, w = get_format(act), emulation.pack(q)
    leaf = x.clone().requires_grad_()
    y = emulation.linear(leaf, w, act=how)
    assert torch.equal(y, emulation.linear(x, w, act=how))
    assert not torch.equal(y, emulation.linear(x, w))
    (grad,) = torch.autograd.grad(y, leaf, direction)
    torch.testing.assert_close(grad, direction @ dequantize(q), rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        dual = emulation.linear(forward_ad.make_dual(x, x), w, act=how)
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, x @ dequantize(q).T, rtol=1e-5, atol=1e-5)


def test_gradients_pass_through_quantised_intermediates() -> None:
    act, weights = get_format("nvfp4"), [quantize(torch.randn(4, n, 64), "mxfp4") for n in (128, 64)]
    x, ids, shares = torch.randn(5, 64), torch.randint(4, (5, 1)), torch.rand(5, 1)
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = emulation.moe(leaf, ids, shares, *map(emulation.pack, weights), GPT_OSS, act=act)

    def stored(x: torch.Tensor) -> torch.Tensor:
        return dequantize(quantize(x.detach()[:, None], act)).squeeze(1) + x - x.detach()

    w13, w2 = (dequantize(w)[ids.squeeze(1)] for w in weights)
    h = reference.activate(torch.einsum("mk,mnk->mn", stored(twin), w13), GPT_OSS)
    wanted = torch.einsum("mk,mnk->mn", stored(h), w2) * shares
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-3)
    y.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-4, atol=1e-2)
