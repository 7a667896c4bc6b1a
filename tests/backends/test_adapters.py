"""Adapters to other packages' kernels against stubs with the packages' signatures, checks and layouts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

from microscale.activations import Activation
from microscale.backends import BACKENDS
from microscale.backends.adapters.common_rules import missing
from microscale.canary import Placer
from microscale.conformance import SILU, Case, cases, run
from microscale.errors import BackendError
from microscale.formats import FORMATS, FP8_GROUP128, activation_format
from microscale.invented import INVENTED
from microscale.machine import PACKAGES, READ
from microscale.oracle import Backend, Problem
from microscale.quant import dequantize, quantize

# (backend, invented machine that it is for, packages, options of its stub)
TARGETS: list[tuple[str, str, tuple[str, ...], dict[str, Any]]] = [
    ("torch_scaled", "h200", (), {"device": "cuda"}),
    ("torch_scaled", "b200", (), {"device": "cuda"}),
    ("torch_scaled", "arc-b580", (), {"device": "xpu"}),
    ("humming", "h200", ("humming-kernels",), {}),
    ("humming", "b200", ("humming-kernels",), {"native": True}),
    ("xpu_kernels", "arc-b580", ("vllm-xpu-kernels",), {}),
    ("flashinfer", "b200", ("flashinfer-python",), {}),
    ("aiter", "mi355x", ("amd-aiter",), {}),
]
NAMES = tuple(dict.fromkeys(name for name, *_ in TARGETS))
Stub = Callable[[str, dict[str, Any]], Any]


def backend_of(name: str) -> Backend:
    return next(b for b in BACKENDS if b.name == name)


def target_problem(case: Case, machine: str, packages: tuple[str, ...]) -> Problem:
    m = INVENTED[machine].with_packages(packages)
    return case.problem(m, m.device)


def edge_cases() -> Iterator[Case]:
    """Beyond the conformance suite: sizes around the packages' tiles, with quantised activations and without."""
    for weight in ("mxfp4", "mxfp8_e4m3", "nvfp4", "fp8_block128"):
        for act in ("a16", "a8", "a4"):
            for bias in (False, True):
                for m, n, k in ((1, 256, 128), (33, 136, 288), (130, 160, 1056), (129, 272, 2944)):
                    yield Case("linear", weight, m, n, k, act, bias=bias)
                yield Case("moe", weight, 40, 160, 288, act, bias=bias, experts=5, top_k=3, activation=SILU)
                yield Case("moe", weight, 3, 128, 384, act, bias=bias, experts=9, top_k=2, activation=SILU)


def runnable(name: str, machine: str, packages: tuple[str, ...]) -> list[Case]:
    refuse = backend_of(name).refuse
    return [c for c in (*cases(), *edge_cases()) if refuse(target_problem(c, machine, packages)) is None]


CASES = [
    pytest.param(name, machine, packages, options, case, id=f"{name}-{machine}-{case.name}")
    for name, machine, packages, options in TARGETS
    for case in runnable(name, machine, packages)
]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    def put(name: str, options: dict[str, Any]) -> Any:
        return import_module(f"stubs.{name}").stub(monkeypatch, **options)

    return put


@pytest.mark.parametrize("name, machine, packages, options, case", CASES)
def test_the_call_is_right_by_numbers(
    name: str,
    machine: str,
    packages: tuple[str, ...],
    options: dict[str, Any],
    case: Case,
    stub: Stub,
    seed: int,
) -> None:
    stub(name, options)
    backend = backend_of(name)
    how = backend.accumulation(target_problem(case, machine, packages))
    worst = run(case, import_module(backend.module), "cpu", torch.Generator().manual_seed(seed), how)
    assert worst <= 1.0, f"error is {worst:.3g} times the permitted one"


def test_every_target_has_cases() -> None:
    for name, machine, packages, _ in TARGETS:
        found = {(c.op, c.weight) for c in runnable(name, machine, packages)}
        assert {op for op, _ in found} == {"linear", "moe"}, f"{name} on {machine}"


def matrix() -> list[Problem]:
    problems = [
        Problem(
            op, weight, n, k, act, dtype, intermediate=192, experts=4, top_k=2, activation=Activation("silu")
        )
        for op in ("linear", "moe")
        for weight in (*FORMATS, "q4_k")
        for act in ("a16", *FORMATS, FP8_GROUP128.name)
        for dtype in ("bf16", "fp16", "fp32")
        for n, k in ((4096, 4096), (31, 33), (0, 0))
    ]
    return problems + [replace(p, bias=True) for p in problems]


@pytest.mark.parametrize(
    "machine", [*INVENTED.values(), replace(INVENTED["h200"], gpus=())], ids=lambda m: m.name
)
def test_refusals_are_total_and_sentences(machine: Any) -> None:
    for m in (machine, machine.with_packages(PACKAGES)):
        for name in NAMES:
            refuse = backend_of(name).refuse
            for device in {m.device, "cpu", "tpu"}:
                for arch in (None, "", "sm_", "gfx1201", "sm_75"):
                    for p in matrix()[:: 7 if arch is None else 61]:
                        on = p.on(m, device)
                        why = refuse(on if arch is None else replace(on, arch=arch))
                        assert why is None or (why and why[-1] not in ".\n" and "\n" not in why)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "torch_scaled"])
def test_without_its_package_it_says_which_one_is_missing(name: str) -> None:
    machine, packages = next((m, p) for n, m, p, _ in TARGETS if n == name)
    case = runnable(name, machine, packages)[0]
    bare = case.problem(INVENTED[machine], INVENTED[machine].device)
    assert backend_of(name).refuse(bare) == f"the package {packages[0]} is not installed"


def test_only_versions_that_were_read() -> None:
    h200 = INVENTED["h200"]

    def why(version: str) -> str | None:
        machine = replace(h200, packages=(("humming-kernels", version),))
        return missing(Problem("linear", "mxfp4", 64, 64).on(machine), "humming-kernels")

    assert why(READ["humming-kernels"]) is None
    assert why("0.1.20") is None
    assert why("0.1.19+cu130") is None
    for other in ("0.1.18", "0.2.0", "1.0", "unknown"):
        found = why(other)
        assert found is not None
        assert found.startswith(f"humming-kernels {other} is installed")
        assert "at least 0.1.19 and below 0.2" in found


def test_a_package_that_is_not_there_at_run_time_is_a_reason_for_the_next(seed: int) -> None:
    machine = INVENTED["h200"].with_packages(["humming-kernels"])
    problem = Problem("linear", "mxfp4", 64, 64).on(machine)
    backends = [b for b in BACKENDS if b.name in ("humming", "emulation")]
    placement = Placer(machine, backends, canary="all").linear(
        problem, quantize(torch.randn(64, 64), "mxfp4")
    )
    assert placement.choice.backend.name == "emulation"
    reason = dict(placement.choice.refused)["humming"]
    assert reason == "it failed while the layer was placed: ModuleNotFoundError: No module named 'humming'"


@pytest.mark.parametrize("name, machine, packages, options", TARGETS, ids=lambda v: str(v))
def test_a_wrong_result_falls_to_the_next_backend_with_a_reason(
    name: str,
    machine: str,
    packages: tuple[str, ...],
    options: dict[str, Any],
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's result is off; the canary finds out, for a linear and for experts.

    By 5 %; of quantised experts by half, since an intermediate may take the neighbouring code.
    """
    stub(name, options)
    module = import_module(backend_of(name).module)
    for op, factor in (("linear", 1.05), ("moe", 1.5)):
        right = getattr(module, op)
        monkeypatch.setattr(module, op, lambda *a, right=right, by=factor, **k: right(*a, **k) * by)
        case = max((c for c in runnable(name, machine, packages) if c.op == op), key=lambda c: c.n * c.k)
        m = INVENTED[machine].with_packages(packages)
        problem = case.problem(m, m.device)
        backends = [b for b in BACKENDS if b.name in (name, "emulation")]
        placer = Placer(m, backends, canary="all")
        w = quantize(torch.randn(case.n, case.k), case.weight)
        if op == "linear":
            placement = placer.linear(problem, w)
        else:
            assert case.activation is not None
            w13 = quantize(torch.randn(case.experts, case.activation.rows(case.n), case.k), case.weight)
            w2 = quantize(torch.randn(case.experts, case.k, case.n), case.weight)
            placement = placer.moe(problem, w13, w2)
        assert placement.choice.backend.name == "emulation"
        assert "the canary failed: its error is" in dict(placement.choice.refused)[name]


@pytest.mark.parametrize("name, machine, packages, options", TARGETS, ids=lambda v: str(v))
def test_gradients_are_those_of_emulation(
    name: str, machine: str, packages: tuple[str, ...], options: dict[str, Any], stub: Stub
) -> None:
    stub(name, options)
    case = next(c for c in runnable(name, machine, packages) if c.op == "linear" and c.m)
    module = import_module(backend_of(name).module)
    w = quantize(torch.randn(case.n, case.k), case.weight)
    act = activation_format(case.weight, case.act)
    x = torch.randn(case.m, case.k, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(case.n, dtype=torch.bfloat16, requires_grad=True) if case.bias else None
    module.linear(x, module.pack(w), bias, act=act).float().sum().backward()
    if bias is not None:
        torch.testing.assert_close(bias.grad, torch.full_like(bias, case.m))
    expected = dequantize(w).sum(0).expand(case.m, -1)
    torch.testing.assert_close(x.grad, expected.bfloat16(), rtol=0.02, atol=0.05)


def packed(module: Any, case: Case) -> tuple[Any, ...] | None:
    """A case's weights as an adapter packs them; None: it refuses, in its own words."""
    shapes = [(case.n, case.k)] if case.op == "linear" else [(2, 2 * case.n, case.k), (2, case.k, case.n)]
    try:
        return tuple(module.pack(quantize(torch.randn(shape), case.weight)) for shape in shapes)
    except BackendError:
        return None


@pytest.mark.parametrize("name, machine, packages, options", TARGETS, ids=lambda v: str(v))
@pytest.mark.parametrize("op", ["linear", "moe"])
def test_what_its_rules_refuse_never_reaches_the_package(
    name: str, machine: str, packages: tuple[str, ...], options: dict[str, Any], op: str, stub: Stub
) -> None:
    """Every format of weights with every one of activations: a result, or a sentence, and no KeyError."""
    stub(name, options)
    module, refuse = import_module(backend_of(name).module), backend_of(name).refuse
    operands = import_module(f"{module.__name__}_rules").operands  # all but what a machine decides
    there = INVENTED[machine].with_packages(packages)
    moe: dict[str, Any] = {"experts": 2, "top_k": 1, "activation": SILU}
    acts = [None, FP8_GROUP128, *(f for f in FORMATS.values() if f.block[0] == 1)]
    ran = 0
    for weight in FORMATS:
        for n, k in ((128, 256), (33, 95)):
            case = Case(op, weight, 2, n, k, bias=False, **(moe if op == "moe" else {}))
            weights = packed(module, case)
            for act in acts:
                for dtype in (torch.bfloat16, torch.float32):
                    asked = replace(case, dtype=dtype).problem(there, there.device)
                    asked = replace(asked, act=act.name if act else "a16")
                    good = operands(asked) is None
                    assert good or refuse(asked) is not None
                    assert not good or weights is not None
                    if weights is None:
                        continue
                    x = torch.randn(2, k).to(dtype)
                    routes = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
                    with contextlib.nullcontext() if good else pytest.raises(BackendError):
                        if op == "linear":
                            y = module.linear(x, *weights, act=act)
                        else:
                            y = module.moe(x, *routes, *weights, SILU, act=act)
                        assert torch.isfinite(y).all()
                        ran += good
    assert ran


@pytest.mark.parametrize("name, machine, packages, options", TARGETS, ids=lambda v: str(v))
def test_shapes_are_checked_before_the_package_is_called(
    name: str,
    machine: str,
    packages: tuple[str, ...],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_module(f"stubs.{name}").stub(monkeypatch, **options)
    module = import_module(backend_of(name).module)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the package was called")

    for op in ("linear", "moe"):
        case = next(c for c in runnable(name, machine, packages) if c.op == op and c.m and not c.bias)
        act = activation_format(case.weight, case.act)
        if op == "linear":
            w = module.pack(quantize(torch.randn(case.n, case.k), case.weight))
        else:
            assert case.activation is not None
            w13 = module.pack(quantize(torch.randn(2, case.activation.rows(case.n), case.k), case.weight))
            w2 = module.pack(quantize(torch.randn(2, case.k, case.n), case.weight))
        monkeypatch.setattr(module, "_product", never)
        monkeypatch.setattr(module, "_grouped", never, raising=False)
        x = torch.randn(3, case.k, dtype=case.dtype)
        ids, shares = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
        if op == "linear":
            for bad in (x[:, 1:], x.long(), x[0, :0]):
                with pytest.raises(BackendError):
                    module.linear(bad, w, act=act)
            continue
        for wrong in (
            (x[:, 1:], ids, shares),
            (x, ids[1:], shares),
            (x, ids, shares[1:]),
            (x, ids + 2, shares),
        ):
            with pytest.raises(BackendError):
                module.moe(*wrong, w13, w2, case.activation, act=act)
        with pytest.raises(BackendError, match="2 experts"):
            module.moe(x, ids, shares, w13, module.pack(quantize(torch.randn(3, case.k, case.n), case.weight)),
                       case.activation, act=act)  # fmt: skip
