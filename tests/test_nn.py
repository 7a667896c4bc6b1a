"""Layers on a backend that repacks: the canonical weights are let go of, and come back whenever they are asked for."""

from __future__ import annotations

import copy
import mmap
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from microscale import pages
from microscale.activations import Activation
from microscale.canary import Placer
from microscale.elements import decode_table
from microscale.formats import FORMATS
from microscale.machine import detect
from microscale.module_tensors import Bias
from microscale.nn import QuantLinear
from microscale.quant import dequantize, quantize
from microscale.quant_experts import QuantExperts
from placed_layers import EMULATION, HOST, Host, K, N, assert_same, cloned, experts, layer, routed


@pytest.mark.parametrize("name", FORMATS)
def test_a_placed_linear_holds_its_weight_once(placer: Placer, name: str) -> None:
    linear, w = layer(placer, name)
    x = torch.randn(3, K)
    before = {key: t.clone() for key, t in linear.state_dict().items()}
    y = linear(x)
    assert (linear.weight_codes.numel(), linear.weight_scales.numel()) == (0, 0)
    assert_same(linear.weight, w)
    after = linear.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], t) for key, t in before.items())
    assert linear.weight_codes.numel() == 0
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)) if name == "mxfp4" else linear):
        assert_same(twin.weight, w)
        assert torch.equal(twin(x), y)


def test_a_linear_is_placed_again_and_moves(placer: Placer) -> None:
    linear, w = layer(placer)
    x = torch.randn(3, K)
    y = linear(x)
    linear.place(torch.float32)
    assert_same(linear.weight, w)
    linear.to("cpu", torch.bfloat16)
    assert linear.placement is None
    assert linear.weight_codes.numel() == w.codes.numel()
    linear.float()
    linear.bias.data.copy_(layer_bias(linear))
    assert linear(x).shape == y.shape
    linear.to("meta")
    assert linear.weight.device.type == "meta"


def layer_bias(linear: QuantLinear) -> Tensor:
    assert linear.bias is not None
    return linear.bias.detach().clone()


def test_loading_other_weights_into_a_placed_linear(placer: Placer) -> None:
    linear, _ = layer(placer)
    other, w = layer(placer)
    x = torch.randn(3, K)
    assert not torch.equal(linear(x), other(x))
    linear.load_state_dict(other.state_dict())
    assert_same(linear.weight, w)
    assert torch.equal(linear(x), other(x))


def test_a_device_that_tensors_are_made_on_by_default_is_nobodys_concern(either: Placer) -> None:
    """Meta stands for any: nothing that should be elsewhere survives there."""
    linear, w = layer(either, "nvfp4")
    host, weights = experts(either)
    args = routed()
    decode_table.cache_clear()
    with torch.device("meta"):
        found, found_too = linear(args[0]), host(*args)
        assert_same(copy.deepcopy(linear).weight, w)
        assert torch.equal(host.state_dict()["first_codes"], weights[0].codes)
        assert torch.equal(quantize(dequantize(w), "nvfp4", tensor_scale=w.tensor_scale).codes, w.codes)
        torch.autograd.grad(linear(args[0].requires_grad_()).sum(), args[0])
    assert torch.equal(linear(args[0]), found)
    assert torch.equal(host(*args), found_too)


def test_going_over_to_a_backend_that_aliases(placer: Placer) -> None:
    linear, w = layer(placer)
    x = torch.randn(3, K)
    linear(x)
    linear.placer = Placer(detect(), (EMULATION,))
    linear.place(torch.float32)
    assert linear.weight_codes.numel() == w.codes.numel()
    assert_same(linear.weight, w)
    torch.testing.assert_close(linear(x), x @ dequantize(w).T + linear.bias, rtol=1e-4, atol=1e-4)


def test_what_is_placed_in_inference_mode_can_be_loaded_outside(placer: Placer) -> None:
    linear, _ = layer(placer)
    other, w = layer(placer)
    for back_inside in (False, True):
        with torch.inference_mode():
            linear(torch.randn(3, K))
            if back_inside:
                linear.float()
        linear.load_state_dict(other.state_dict())
        assert_same(linear.weight, w)


def test_placed_experts_are_held_once(placer: Placer) -> None:
    host, weights = experts(placer)
    args = routed()
    before = {key: t.clone() for key, t in host.state_dict().items()}
    y = host.microscale(*args)
    assert host.first_codes.numel() == host.second_scales.numel() == 0
    assert isinstance(host.first_codes, nn.Parameter)
    after = nn.Sequential(host).state_dict(prefix="model.")
    assert list(after) == [f"model.0.{key}" for key in before]
    assert all(torch.equal(after[f"model.0.{key}"], t) for key, t in before.items())
    for twin in (
        host,
        copy.deepcopy(host),
        pickle.loads(pickle.dumps(host)),
        copy.deepcopy(copy.deepcopy(host)),
    ):
        for found, wanted in zip(twin.microscale.weights[:2], weights, strict=True):
            assert torch.equal(found.codes, wanted.codes)
            assert torch.equal(found.scales, wanted.scales)
        assert list(twin.state_dict()) == list(before)
        assert all(torch.equal(t, before[key]) for key, t in twin.state_dict().items())
        assert torch.equal(twin.microscale(*args), y)
        assert twin.microscale.module is twin


def test_experts_take_other_weights_and_other_backends(placer: Placer) -> None:
    host, _ = experts(placer)
    other, _ = experts(placer)
    args = routed()
    assert not torch.equal(host.microscale(*args), other.microscale(*args))
    host.load_state_dict(other.state_dict())
    assert host.first_codes.numel() > 0
    wanted = other.microscale(*args)
    assert torch.equal(host.microscale(*args), wanted)
    host.microscale.placer = Placer(detect(), (EMULATION,))
    host.microscale.place(torch.float32)
    assert host.first_codes.numel() > 0
    torch.testing.assert_close(host.microscale(*args), wanted, rtol=1e-3, atol=1e-3)


def test_experts_placed_in_inference_mode_can_be_loaded_outside(placer: Placer) -> None:
    host, _ = experts(placer)
    other, _ = experts(placer)
    args = routed()
    for back_inside in (False, True):
        with torch.inference_mode():
            host.microscale(*args)
            if back_inside:
                host.microscale.take_back()
        host.load_state_dict(other.state_dict())
        assert torch.equal(host.microscale(*args), other.microscale(*args))


def test_a_bias_that_is_trained_is_read_anew(placer: Placer) -> None:
    host, _ = experts(placer)
    args = routed()
    with torch.no_grad():
        before = host.microscale(*args)
        assert torch.equal(host.microscale(*args), before)
        host.bias.add_(1)
        assert not torch.equal(host.microscale(*args), before)
    host.microscale(*args).sum().backward()
    assert host.bias.grad is not None
    assert host.bias.grad.abs().sum() > 0


def test_a_bias_that_is_replaced_is_read_anew(placer: Placer) -> None:
    host, weights = experts(placer)
    args = routed()
    with torch.no_grad():
        host.microscale(*args)
        for put in (
            lambda b: setattr(host, "bias", nn.Parameter(b)),
            lambda b: setattr(host.bias, "data", b),
        ):
            bias = torch.randn(4, 64).bfloat16()
            put(bias)
            fresh = Host(*map(cloned, weights))
            fresh.bias = nn.Parameter(bias.clone())
            runner = QuantExperts(fresh, HOST, Activation("silu"), 2, placer)
            assert torch.equal(host.microscale(*args), runner(*args))


@pytest.mark.parametrize("aliases", [False, True])
def test_a_linear_that_is_given_another_part_computes_with_it(placer: Placer, aliases: bool) -> None:
    linear, _ = layer(Placer(detect(), (EMULATION,)) if aliases else placer, "nvfp4")
    other, x = quantize(torch.randn(N, K), "nvfp4"), torch.randn(3, K)
    linear(x)
    for part in ("codes", "scales", "tensor_scale"):
        setattr(linear, f"weight_{part}", getattr(other, part))
        linear(x)
    assert_same(linear.weight, other)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), x @ dequantize(other).T + linear.bias, rtol=1e-4, atol=1e-4)


def resident(t: Tensor) -> int:
    """Bytes of the mapping of `t` that are in memory."""
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
        here = False
        for line in lines:
            head = line.split(maxsplit=1)[0]
            if "-" in head:
                start, stop = (int(a, 16) for a in head.split("-"))
                here = start <= t.data_ptr() < stop
            elif here and head == "Rss:":
                return int(line.split()[1]) * 1024
    return 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says which memory is a file's")
@pytest.mark.parametrize("shared", [False, True])
def test_pages_of_a_file_go_back_and_what_they_hold_stays(tmp_path: Path, shared: bool) -> None:
    size = 64 * mmap.PAGESIZE
    (tmp_path / "file").write_bytes(bytes(range(256)) * (size // 256))
    storage = torch.UntypedStorage.from_file(str(tmp_path / "file"), shared, size)
    t = torch.empty(0, dtype=torch.uint8).set_(storage)
    t[5000] = 77  # a page that differs from the file's
    wanted = t.clone()
    assert resident(t) >= size
    pages.give_back([t[100:-100]])
    assert torch.equal(t, wanted)
    pages.give_back([t[100:-100], torch.ones(10), torch.ones(0), torch.ones(1 << 20)])
    assert resident(t) <= size  # the system may refuse: what is promised is that nothing changes
    assert torch.equal(t, wanted)


def test_a_bias_whose_changes_leave_no_trace_is_never_a_copy() -> None:
    with torch.inference_mode():
        bias = torch.randn(8).to(torch.bfloat16)
        assert Bias().now(bias) is bias
    traced = torch.randn(8).to(torch.bfloat16)
    held = Bias()
    with torch.no_grad():
        first = held.now(traced)
        assert first is not None
        assert first.dtype == torch.float32
        assert held.now(traced) is first
        traced.add_(1)
        assert torch.equal(held.now(traced), traced.float())


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8_block128"])
def test_a_change_of_dtype_leaves_the_scales_alone(name: str) -> None:
    layer = QuantLinear(quantize(torch.randn(48, 128), name), torch.randn(48), Placer())
    before, x = layer.weight, torch.randn(3, 128)
    expected = layer(x)
    assert torch.equal(layer.to(torch.float16).to(torch.float32).weight.scales, before.scales)
    if before.tensor_scale is not None:
        assert torch.equal(layer.weight.tensor_scale, before.tensor_scale)
    layer.bias.data.copy_(layer.bias.half())  # it alone is rounded
    assert torch.allclose(layer(x), expected, atol=1e-2)
    assert layer.half()(x.half()).dtype == torch.float16


@pytest.mark.skipif(
    not detect().core, reason=f"the C++ core is not in this installation: {detect().core_missing}"
)
def test_a_placed_layer_is_one_graph_to_torch_compile() -> None:
    layer = QuantLinear(quantize(torch.randn(48, 64), "mxfp4"), None, Placer())
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)


def test_torch_compile_of_a_layer_that_is_not_placed_yet(placer: Placer) -> None:
    linear, w = layer(placer)
    x = torch.randn(3, K)
    with torch.no_grad():
        found = torch.compile(linear, backend="eager")(x)
    assert torch.equal(found, linear(x))
    assert_same(linear.weight, w)
