"""Products with weights that are not quantised: the C++ core's numbers, and what a layer leaves to torch."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from microscale.backends.dense_rules import choose_dense, refuse
from microscale.canary import Placer
from microscale.dense import ROWS, DenseLinear, place_dense
from microscale.invented import INVENTED
from microscale.machine import detect
from microscale.oracle import Problem
from microscale.tolerance import dense_budget

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROBLEM = Problem("linear", "bf16", 64, 32)


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m, n, k",
    [
        (0, 5, 8),
        (1, 1, 1),
        (1, 33, 0),
        (3, 17, 31),
        (8, 64, 32),
        (9, 70, 2880),
        (13, 5, 95),
        (65, 31, 33),
        (1, 2048, 256),
    ],
)
def test_within_the_budget_of_float64(
    cpu: Any, level: str, dtype: torch.dtype, m: int, n: int, k: int
) -> None:
    x, w, bias = operands(m, n, k, dtype)
    for b in (bias, None):
        y = cpu.cpu_core.dense(x, w, b)
        assert (y.shape, y.dtype) == ((m, n), dtype)
        assert dense_budget(x, w, b).worst(y) <= 1


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_activations_of_different_dtypes(
    cpu: Any, level: str, weights: torch.dtype, dtype: torch.dtype
) -> None:
    x, w, bias = torch.randn(5, 70).to(dtype), torch.randn(21, 70).to(weights), torch.randn(21).to(weights)
    assert dense_budget(x, w, bias).worst(cpu.cpu_core.dense(x, w, bias)) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_neither_on_others_nor_on_threads(
    cpu: Any, level: str, threads: Any, dtype: torch.dtype
) -> None:
    x, w, bias = operands(19, 700, 333, dtype)
    whole = cpu.cpu_core.dense(x, w, bias)
    for count in (1, 2, 3):
        threads(count)
        for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19):
            assert torch.equal(cpu.cpu_core.dense(x[:m], w, bias), whole[:m])
            assert torch.equal(cpu.cpu_core.dense(x[19 - m :], w, bias), whole[19 - m :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_addresses_and_what_lies_between_rows(cpu: Any, level: str, dtype: torch.dtype) -> None:
    """K = 40 is no multiple of any vector: what is read past a row's end must not count, even if it is NaN."""
    x, w, bias = operands(6, 24, 40, dtype)
    wanted = cpu.cpu_core.dense(x, w, bias)
    room = torch.full((30, 100), float("nan"), dtype=dtype)
    far, apart = room[1:25, 30:70], torch.full((9, 90), float("nan"), dtype=dtype)[2:8, 7:47]
    far.copy_(w)
    apart.copy_(x)
    spread = bias.repeat_interleave(2)[::2]
    assert torch.equal(cpu.cpu_core.dense(apart, far, spread), wanted)
    assert torch.equal(cpu.cpu_core.dense(x.view(2, 3, 40), w, bias), wanted.view(2, 3, 24))
    assert torch.equal(cpu.cpu_core.dense(x[2], w, bias), wanted[2])
    assert torch.equal(cpu.cpu_core.dense(x.T.contiguous().T, w, bias), wanted)
    assert torch.equal(cpu.cpu_core.dense(x[:1].expand(5, 40), w, bias), wanted[:1].expand(5, 24))
    assert torch.equal(cpu.cpu_core.dense(x.flip(0)[::2], w, bias), wanted.flip(0)[::2])
    size = dtype.itemsize
    for offset in range(size, 64, size):  # no address is better than its dtype asks for
        memory = bytearray(offset + w.nbytes)
        moved = torch.frombuffer(memory, dtype=dtype, offset=offset).view(24, 40).copy_(w)
        assert torch.equal(cpu.cpu_core.dense(x, moved, bias), wanted)


def test_numbers_that_are_none(cpu: Any, level: str) -> None:
    x, w, _ = operands(2, 20, 50, torch.bfloat16)
    w[3, 49], w[7, 0], x[1, 5] = float("nan"), float("inf"), float("-inf")
    y = cpu.cpu_core.dense(x, w, None)
    wanted = x.double() @ w.double().T
    assert torch.equal(torch.isnan(y), torch.isnan(wanted))
    assert torch.equal(torch.isinf(y), torch.isinf(wanted))
    assert torch.isfinite(y[0, 8:]).all()


@pytest.fixture
def calls(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that the core computes."""
    seen: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(cpu.cpu_core._core, name)

        def dense(self, *args: int) -> None:
            seen.append(args[10])
            cpu.cpu_core._core.dense(*args)

    monkeypatch.setattr(cpu.cpu_core, "_run", Counting())
    return seen


def layer(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    made = nn.Linear(96, 40, dtype=dtype, **options)
    place_dense(made, DenseLinear, dtype, Placer())
    return made


@pytest.fixture
def rows() -> int:
    """How many rows are few, where the core takes such layers; else a skip that says why not."""
    if (why := refuse(PROBLEM.on(detect(), "cpu"))) is not None:
        pytest.skip(why)
    return ROWS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_linear_it_was(calls: list[int], rows: int, dtype: torch.dtype, bias: bool) -> None:
    twin = nn.Linear(96, 40, bias, dtype=dtype)
    made = copy.deepcopy(twin)
    place_dense(made, DenseLinear, dtype, Placer())
    assert type(made) is DenseLinear
    assert made.placement.proof.startswith("canary passed at 0.")
    assert f"cpu up to {rows} rows" in repr(made)
    assert made.state_dict().keys() == twin.state_dict().keys()
    calls.clear()
    with torch.no_grad():
        for shape in [(1, 96), (rows, 96), (1, 1, 96), (96,), (0, 96)]:
            x = torch.randn(shape).to(dtype)
            y = made(x)
            assert (y.shape, y.dtype) == ((*shape[:-1], 40), dtype)
            assert dense_budget(x.view(-1, 96), twin.weight, twin.bias).worst(y.view(-1, 40)) <= 1
    assert calls == [1, rows, 1, 1]  # no rows are no call
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(other) is DenseLinear
        with torch.no_grad():
            assert torch.equal(other(x), y)
    stream = io.BytesIO()
    torch.save(made.state_dict(), stream)
    stream.seek(0)
    twin.load_state_dict(torch.load(stream))


def test_what_a_layer_leaves_to_torch(calls: list[int], rows: int) -> None:
    made = layer()
    calls.clear()
    x = torch.randn(rows + 1, 96).bfloat16()
    with torch.no_grad():
        assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
        with torch.autocast("cpu", torch.float16):
            assert made(x[:1]).dtype == torch.float16
        traced = torch.jit.trace(made, x[:1], check_trace=False)
        other = torch.randn(1, 96).bfloat16()
        assert torch.equal(traced(other), F.linear(other, made.weight, made.bias))
        wide = copy.deepcopy(made).double()
        assert wide(x[:1].double()).dtype == torch.float64
        half = copy.deepcopy(made)
        half.bias = nn.Parameter(half.bias.to("meta"))
        with suppress(RuntimeError):  # torch's to say
            half(x[:1])
        assert made.to("meta")(x[:1].to("meta")).device.type == "meta"
    assert calls == []


def test_torch_says_what_is_wrong(calls: list[int], rows: int) -> None:
    made, plain = layer(), nn.Linear(96, 40, dtype=torch.bfloat16)
    calls.clear()
    for bad in (torch.randn(1, 96), torch.randn(1, 95).bfloat16(), torch.ones(1, 96, dtype=torch.int64)):
        with torch.no_grad(), pytest.raises(RuntimeError) as wanted:
            plain(bad)
        with torch.no_grad(), pytest.raises(RuntimeError) as found:
            made(bad)
        assert str(found.value) == str(wanted.value)
    assert calls == []


def test_a_layer_trains(calls: list[int], rows: int) -> None:
    made = layer()
    twin = nn.Linear(96, 40, dtype=torch.bfloat16)
    twin.load_state_dict(made.state_dict())
    calls.clear()
    x = torch.randn(2, 96).bfloat16()
    grads = []
    for module in (made, twin):
        inputs = x.clone().requires_grad_()
        module(inputs).float().square().sum().backward()
        grads.append((inputs.grad, module.weight.grad, module.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert calls == []
    made.requires_grad_(False)
    made(x)  # nothing asks for a gradient
    assert calls == [2]


def test_torch_compile_sees_one_node(cpu: Any, rows: int) -> None:
    made = layer()
    nodes: list[list[str]] = []

    def look(graph: Any, inputs: Any) -> Any:
        nodes.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    compiled = torch.compile(lambda x: made(x) * 2, fullgraph=True, backend=look)
    with torch.no_grad():
        few, many = torch.randn(1, 96).bfloat16(), torch.randn(rows + 30, 96).bfloat16()
        assert torch.equal(compiled(few), made(few) * 2)
        assert torch.equal(compiled(many), made(many) * 2)
    assert sum("microscale.dense" in name for name in nodes[0]) == 1
    assert not any("microscale.dense" in name for name in nodes[-1])
    x, w, bias = operands(3, 24, 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.microscale.dense.default, (x, w, bias))


def test_a_canary_that_fails_leaves_the_layer_to_torch(
    cpu: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = cpu.cpu_core.dense
    monkeypatch.setattr(cpu.cpu_core, "dense", lambda x, w, bias: dense(x, w, bias) * 1.5)
    made = layer()
    choice = made.placement.choice
    assert choice.backend.name == "transformers"
    assert choice.refused[0][1].startswith("the canary failed: its error is ")
    x = torch.randn(1, 96).bfloat16()
    with torch.no_grad():
        assert torch.equal(made(x), F.linear(x, made.weight, made.bias))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    zen, mac = INVENTED["zen5"], INVENTED["mac"]
    assert refuse(PROBLEM.on(zen)) is None
    assert refuse(PROBLEM.on(INVENTED["avx2-laptop"])) is None
    assert refuse(PROBLEM.on(INVENTED["h200"])) == "the C++ core runs on the CPU, not on cuda"
    assert str(refuse(PROBLEM.on(replace(zen, core="")))).startswith(
        "the C++ core is not in this installation"
    )
    assert refuse(replace(PROBLEM, weight="fp32", dtype="fp32").on(zen)) is None
    why = refuse(replace(PROBLEM, weight="float64").on(zen))
    assert why == "the core has no product for weights in float64"
    assert refuse(replace(PROBLEM, dtype="fp32").on(zen)) == "activations are fp32 and weights bf16"
    said = "its wide kernels are for x86 with AVX2 or more, and the level here is "
    assert refuse(PROBLEM.on(mac, "cpu")) == f"{said}neon"
    assert refuse(PROBLEM.on(INVENTED["plain-x86"])) == f"{said}plain"
    problem = PROBLEM.on(zen)
    assert choose_dense(problem).backend.name == choose_dense(problem, "cpu").backend.name == "cpu"
    forced = choose_dense(problem, "emulation")
    assert (forced.backend.name, forced.refused) == (
        "transformers",
        (("cpu", "not the forced one (emulation)"),),
    )
    monkeypatch.setenv("MICROSCALE_DENSE", "off")
    assert choose_dense(problem).refused == (("cpu", "MICROSCALE_DENSE=off"),)
