"""Layers on a backend that repacks: the canonical weights are let go of, and come back whenever they are asked for."""

from __future__ import annotations

import copy
import mmap
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microscale import pages
from microscale.activations import Activation
from microscale.backends import emulation
from microscale.canary import Placer
from microscale.elements import decode_table
from microscale.errors import BackendError, FormatError
from microscale.experts_host import ExpertsHost
from microscale.formats import FORMATS
from microscale.machine import detect
from microscale.module_tensors import Bias
from microscale.nn import QuantExperts, QuantLinear
from microscale.oracle import Backend
from microscale.quant import QuantTensor, dequantize, quantize

N, K = 48, 64


def cloned(w: QuantTensor) -> QuantTensor:
    return QuantTensor(w.format, w.shape, w.codes.clone(), w.scales.clone(), w.tensor_scale, w.rule)


def refuse_nothing(problem: Any) -> str | None:
    return None


EMULATION = Backend("emulation", "microscale.backends.emulation", refuse_nothing, "slow")
REPACKER = Backend("repacker", "repacker_for_tests", refuse_nothing, "copies")


@pytest.fixture(autouse=True)
def repacker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulation that copies: what holds for it holds for the C++ core, on any machine."""
    module: Any = ModuleType(REPACKER.module)
    module.REPACKS = True
    module.pack = lambda w: emulation.Packed(cloned(w))
    module.unpack = lambda packed: cloned(packed.weight)
    module.linear, module.moe = emulation.linear, emulation.moe
    monkeypatch.setitem(sys.modules, REPACKER.module, module)


@pytest.fixture(params=["repacker", "cpu"])
def placer(request: pytest.FixtureRequest) -> Iterator[Placer]:
    if request.param == "repacker":
        yield Placer(detect(), (REPACKER,))
    else:
        if not detect().core:
            pytest.skip(f"the C++ core is not in this installation: {detect().core_missing}")
        yield Placer(force="cpu")


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


@pytest.fixture(params=["held", "aliased"])
def either(request: pytest.FixtureRequest, placer: Placer) -> Placer:
    """A backend that empties the buffers, and one whose packed form they are."""
    return placer if request.param == "held" else Placer(detect(), (EMULATION,))


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
