"""Layers compute with the weights that they have been given since they were placed, for good or for a call."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from microscale.canary import Placer
from microscale.errors import BackendError, FormatError
from microscale.nn import QuantLinear
from microscale.quant import quantize
from placed_layers import K, N, assert_same, cloned, experts, layer, routed


@pytest.mark.parametrize(
    ("name", "part", "dtype"),
    [
        ("mxfp4", "scales", torch.float8_e8m0fnu),
        ("nvfp4", "scales", torch.float8_e4m3fn),
        ("mxfp8_e4m3", "codes", torch.float8_e4m3fn),
        ("mxint8", "codes", torch.int8),
        ("fp8_block128", "scales", torch.int32),
    ],
)
def test_bits_are_not_loaded_as_numbers(placer: Placer, name: str, part: str, dtype: torch.dtype) -> None:
    linear, w = layer(placer, name)
    other, _ = layer(placer, name)
    x = torch.randn(3, K)
    y, state = linear(x), other.state_dict()
    state[f"weight_{part}"] = state[f"weight_{part}"].view(dtype)
    with pytest.raises(RuntimeError, match=rf"weight_{part} is torch\..*, and the state has {dtype}; .view"):
        linear.load_state_dict(state)
    assert_same(linear.weight, w)
    assert torch.equal(linear(x), y)


def test_bits_of_experts_are_not_loaded_as_numbers(placer: Placer) -> None:
    host, _ = experts(placer)
    state = host.state_dict()
    state["first_scales"] = state["first_scales"].view(torch.float8_e8m0fnu)
    with pytest.raises(
        RuntimeError, match=r"first_scales is torch\.uint8, and the state has torch\.float8_e8m0fnu"
    ):
        host.load_state_dict(state)


@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("given", [("codes", "scales", "tensor_scale"), ("scales",), ("tensor_scale",)])
def test_a_linear_computes_with_what_it_is_given_for_a_call(
    either: Placer, given: tuple[str, ...], placed: bool
) -> None:
    linear, w = layer(either, "nvfp4")
    other, x = quantize(torch.randn(N, K), "nvfp4"), torch.randn(3, K)
    if placed:
        linear(x)
    mixed = replace(w, **{part: getattr(other, part) for part in given})
    wanted, own = (QuantLinear(cloned(q), linear.bias, either)(x) for q in (mixed, w))
    assert not torch.equal(wanted, own)
    for _ in range(2):
        state = {f"weight_{part}": getattr(cloned(other), part) for part in given}
        assert torch.equal(torch.func.functional_call(linear, state, (x,)), wanted)
        assert torch.equal(linear(x), own)
        assert_same(linear.weight, w)
    for part in given:
        linear.register_buffer(f"weight_{part}", getattr(other, part))  # no attribute is set
    assert torch.equal(linear(x), wanted)
    assert_same(linear.weight, mixed)
    assert torch.equal(linear.state_dict()["weight_scales"], mixed.scales)
    assert torch.equal(copy.deepcopy(linear)(x), wanted)


def test_a_linear_that_is_compiled_computes_with_what_it_is_given_for_a_call(either: Placer) -> None:
    linear, _ = layer(either)
    other, _ = layer(either)
    x = torch.randn(3, K)
    with torch.no_grad():
        own, wanted = linear(x), other(x)
        state = other.state_dict()

        def call(x: Tensor) -> Tensor:
            y: Tensor = torch.func.functional_call(linear, state, (x,))
            return y

        torch.testing.assert_close(torch.compile(call, backend="eager")(x), wanted)
        torch.testing.assert_close(torch.compile(linear, backend="eager")(x), own)


@pytest.mark.parametrize("placed", [True, False])
def test_weights_under_vmap_are_refused_and_nothing_is_held_against_the_layer(
    either: Placer, placed: bool
) -> None:
    linear, w = layer(either)
    x = torch.randn(3, K)
    if placed:
        linear(x)
    state = {"weight_codes": torch.stack([w.codes, w.codes])}
    for _ in range(2):
        with pytest.raises(BackendError, match="vmap"):
            torch.func.vmap(lambda given: torch.func.functional_call(linear, given, (x,)))(state)
    assert torch.equal(linear(x), QuantLinear(w, linear.bias, either)(x))


def test_given_weights_that_no_backend_takes_fail_every_time(placer: Placer) -> None:
    linear, w = layer(placer)
    x = torch.randn(3, K)
    linear(x)
    state = {"weight_codes": w.codes.double()}
    for _ in range(2):
        with pytest.raises(FormatError, match=r"codes: expected torch\.uint8"):
            torch.func.functional_call(linear, state, (x,))
    assert torch.equal(linear(x), QuantLinear(w, linear.bias, placer)(x))


@pytest.mark.parametrize("strict", [True, False])
def test_a_placed_linear_is_exported(either: Placer, strict: bool) -> None:
    linear, _ = layer(either)
    x = torch.randn(3, K)
    y = linear(x)
    with torch.no_grad():
        assert torch.equal(torch.export.export(linear, (x,), strict=strict).module()(x), y)
    trained = torch.nn.Sequential(torch.nn.Linear(K, K), linear)
    assert torch.equal(torch.export.export(trained, (x,), strict=strict).module()(x), trained(x))


def test_a_shallow_copy_of_a_linear_is_emptied_alone(either: Placer) -> None:
    linear, w = layer(either)
    x = torch.randn(3, K)
    y = copy.copy(linear)(x)
    assert_same(linear.weight, w)
    assert torch.equal(linear(x), y)


@pytest.mark.parametrize("name", ["first_codes", "second_scales", ""])
def test_experts_compute_with_what_they_are_given_for_a_call(either: Placer, name: str) -> None:
    host, _ = experts(either)
    other, _ = experts(either)
    args = routed()
    own = host(*args)
    state = {key: t for key, t in other.state_dict().items() if name in key or not name}
    twin = copy.deepcopy(host)
    twin.load_state_dict({**host.state_dict(), **state})
    wanted = twin(*args)
    assert not torch.equal(own, wanted)
    for _ in range(2):
        assert torch.equal(torch.func.functional_call(host, dict(state), args), wanted)
        assert torch.equal(host(*args), own)
    for key, t in state.items():
        setattr(host, key, nn.Parameter(t, requires_grad=False) if key in host._parameters else t)
    assert torch.equal(host(*args), wanted)
    assert all(torch.equal(t, twin.state_dict()[key]) for key, t in host.state_dict().items())
    assert torch.equal(copy.deepcopy(host)(*args), wanted)
    host.microscale.take_back()
    assert torch.equal(host(*args), wanted)
