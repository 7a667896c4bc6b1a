"""The C++ core as a backend: refusals, operands, the environment, torch.compile. test_cpu_numbers.py has the rest."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from microscale import env
from microscale.activations import GPT_OSS, KINDS, Activation
from microscale.backends import BACKENDS, emulation
from microscale.backends.cpu_rules import refuse
from microscale.canary import Placer
from microscale.errors import BackendError, SettingError
from microscale.formats import FORMATS, get_format
from microscale.invented import INVENTED
from microscale.machine import CORE, detect
from microscale.nn import QuantLinear
from microscale.oracle import Problem, choose
from microscale.quant import quantize

LINEAR = Problem("linear", "mxfp4", 33, 95)
MOE = Problem(
    "moe", "nvfp4", 2880, 2880, intermediate=2880, experts=32, top_k=4, activation=GPT_OSS, bias=True
)


@pytest.mark.parametrize("weight", FORMATS)
@pytest.mark.parametrize("machine", INVENTED.values(), ids=lambda m: m.name)
def test_every_format_is_taken_on_every_cpu(machine: Any, weight: str) -> None:
    for problem in (LINEAR, MOE):
        for dtype in ("bf16", "fp16", "fp32"):
            placed = replace(problem, weight=weight, dtype=dtype).on(machine, "cpu")
            assert refuse(placed) is None
            assert choose(placed, BACKENDS).backend.name == "cpu"


def test_refusals() -> None:
    zen = INVENTED["zen5"]
    assert refuse(LINEAR.on(INVENTED["h200"])) == "the C++ core runs on the CPU, not on cuda"
    assert refuse(LINEAR.on(INVENTED["mac"])) == "the C++ core runs on the CPU, not on mps"
    why = refuse(LINEAR.on(replace(zen, core="")))
    assert why == "the C++ core is not in this installation (`microscale doctor` says why)"
    assert "fp8_group128" in str(refuse(replace(LINEAR, weight="fp8_group128").on(zen)))
    assert CORE in LINEAR.on(zen).packages


def test_the_core_is_here_or_says_why_not() -> None:
    machine = detect()
    assert bool(machine.core) != bool(machine.core_missing)
    if os.environ.get("MICROSCALE_TEST_CORE") == "required":
        assert machine.core, f"the C++ core is not in this installation: {machine.core_missing}"
    elif not machine.core:
        pytest.skip(f"the C++ core is not in this installation: {machine.core_missing}")


def test_tables_are_those_of_the_header(cpu: Any) -> None:
    header = Path(__file__).parents[2] / "csrc" / "microscale.h"
    enums = dict(re.findall(r"enum (\w+) \{(.*?)\}", header.read_text(), re.DOTALL))
    words = {
        name: [w.strip().removeprefix("MS_").lower() for w in body.split(",")] for name, body in enums.items()
    }
    assert words["ms_format"] == [*FORMATS, "formats"] == [*cpu.FORMAT_IDS, "formats"]
    assert words["ms_level"] == [*env.CPU_LEVELS, "levels"]
    assert words["ms_kind"] == [*KINDS, "kinds"]
    assert words["ms_dtype"] == ["bf16", "fp16", "fp32", "dtypes"]


def test_the_core_and_the_machine_agree_on_the_level(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MICROSCALE_CPU_LEVEL", raising=False)
    widest, compiled = cpu.cpu_core.level(), env.CPU_LEVELS.index(detect().core)
    assert widest <= compiled
    level = detect().level
    assert widest == min(compiled, env.CPU_LEVELS.index("plain" if level == "neon" else level))


def test_the_environment_lowers_the_level(cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, word in enumerate(env.CPU_LEVELS):
        monkeypatch.setenv("MICROSCALE_CPU_LEVEL", word)
        monkeypatch.setattr(cpu.cpu_core, "_widest", lambda i=i: i)
        assert cpu.cpu_core.level() == i
    monkeypatch.setattr(cpu.cpu_core, "_widest", lambda: 1)
    with pytest.raises(
        SettingError, match="MICROSCALE_CPU_LEVEL=amx, and the widest level here is avx2; the core"
    ):
        cpu.cpu_core.level()
    monkeypatch.setenv("MICROSCALE_CPU_LEVEL", "sse")
    with pytest.raises(SettingError, match=r"'sse'; known: plain, avx2, avx512, avx512_bf16, amx"):
        cpu.cpu_core.level()


def test_a_setting_that_cannot_be_followed_is_no_reason_to_emulate(
    cpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROSCALE_CPU_LEVEL", "sse")
    w = quantize(torch.randn(32, 64), "mxfp4")
    problem = Problem("linear", "mxfp4", 32, 64).on(detect(), "cpu")
    with pytest.raises(SettingError, match="sse"):
        Placer().linear(problem, w)


def test_operands_that_contradict_each_other(cpu: Any) -> None:
    w = cpu.pack(quantize(torch.randn(8, 64), "mxfp4"))
    x = torch.randn(2, 64)
    for bad in (torch.randn(2, 32), torch.ones(2, 64, dtype=torch.int64), x.double(), x.to("meta")):
        with pytest.raises(BackendError):
            cpu.linear(bad, w)
    with pytest.raises(BackendError, match="bias"):
        cpu.linear(x, w, torch.randn(7))
    with pytest.raises(BackendError, match="shares a scale between 128 rows"):
        cpu.linear(x, w, act=FORMATS["fp8_block128"])
    experts = cpu.pack(quantize(torch.randn(2, 64, 64), "mxfp4"))
    ids, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    kind = Activation("relu2", gated=False)
    with pytest.raises(BackendError, match="shares a scale between 128 rows"):
        cpu.moe(x, ids, weights, experts, experts, kind, act=FORMATS["fp8_block128"])
    with pytest.raises(
        BackendError, match=r"packs \[N, K\] or \[E, N, K\] weights on the CPU, not mxfp4 \[64\]"
    ):
        cpu.pack(quantize(torch.randn(64), "mxfp4"))
    with pytest.raises(BackendError, match="meta"):
        cpu.pack(quantize(torch.randn(8, 64), "mxfp4").to("meta"))


@pytest.mark.parametrize("bad", [-2, 4])
def test_ids_out_of_range(cpu: Any, bad: int) -> None:
    w13, w2 = (cpu.pack(quantize(torch.randn(4, n, 32), "mxfp4")) for n in (64, 32))
    x, ids = torch.randn(2, 32), torch.tensor([[0, 1], [bad, 3]])
    with pytest.raises(BackendError, match=rf"expert id {bad} is not in \[-1, 4\)"):
        cpu.moe(x, ids, torch.rand(2, 2), w13, w2, Activation("silu"))


def test_the_core_itself_refuses_a_buffer_of_something_else(cpu: Any) -> None:
    x, y = torch.randn(2, 32), torch.empty(2, 16)
    w = torch.zeros(4096, dtype=torch.uint8)
    rest = (0, 2, x.data_ptr(), 32, 0, 2, 0, y.data_ptr(), 1)
    with pytest.raises(ValueError, match="does not hold a tensor that this core packed"):
        cpu.cpu_core._core.linear(0, w.data_ptr(), *rest)
    with pytest.raises(ValueError, match="packed_bytes"):
        cpu.cpu_core._core.packed_bytes(99, 1, 16, 32)
    good = cpu.pack(quantize(torch.randn(16, 32), "mxfp4"))
    with pytest.raises(ValueError, match="level"):
        cpu.cpu_core._core.linear(99, good.buffer.data_ptr(), *rest)


@pytest.mark.parametrize("shape", [(0, 64), (8, 0), (0, 0)])
def test_shapes_without_numbers(cpu: Any, shape: tuple[int, int]) -> None:
    n, k = shape
    q = quantize(torch.randn(shape), "mxfp4")
    w, x, bias = cpu.pack(q), torch.randn(3, k), torch.randn(n)
    back = cpu.unpack(w)
    assert (back.shape, back.codes.shape, back.scales.shape) == (q.shape, q.codes.shape, q.scales.shape)
    assert torch.equal(cpu.linear(x, w, bias), bias.expand(3, n))
    assert torch.equal(cpu.linear(x, w), torch.zeros(3, n))


@pytest.mark.parametrize(
    "hidden, intermediate, tokens, top_k", [(32, 0, 2, 2), (0, 32, 2, 2), (32, 32, 2, 0)]
)
def test_moe_shapes_without_numbers(
    cpu: Any, hidden: int, intermediate: int, tokens: int, top_k: int
) -> None:
    q13 = quantize(torch.randn(4, 2 * intermediate, hidden), "mxfp4")
    q2 = quantize(torch.randn(4, hidden, intermediate), "mxfp4")
    x, ids = torch.randn(tokens, hidden), torch.randint(4, (tokens, top_k))
    weights, b2 = torch.rand(tokens, top_k), torch.randn(4, hidden)
    args = (Activation("silu"),)
    found = cpu.moe(x, ids, weights, cpu.pack(q13), cpu.pack(q2), *args, b2=b2)
    wanted = emulation.moe(x, ids, weights, emulation.pack(q13), emulation.pack(q2), *args, b2=b2)
    assert torch.equal(found, wanted)


def test_leading_dimensions_strides_and_what_lies_between_rows(cpu: Any, level: str) -> None:
    """K = 40 is no multiple of any vector: what is read past a row's end must not count, even if it is NaN."""
    w = cpu.pack(quantize(torch.randn(24, 40), "mxfp8_e4m3"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        room = torch.full((9, 100), float("nan"), dtype=dtype)
        x = room[1:7, 30:70]
        x.copy_(torch.randn(6, 40))
        wanted = cpu.linear(x.clone(), w)
        assert torch.isfinite(wanted).all()
        assert torch.equal(cpu.linear(x, w), wanted)
        assert torch.equal(cpu.linear(x.clone().view(2, 3, 40), w), wanted.view(2, 3, 24))
        assert torch.equal(cpu.linear(x[2], w), wanted[2])
        assert torch.equal(cpu.linear(x.T.contiguous().T, w), wanted)
        assert torch.equal(cpu.linear(x[:1].expand(5, 40), w), wanted[:1].expand(5, 24))
        assert torch.equal(cpu.linear(x.flip(0)[::2], w), wanted.flip(0)[::2])


def test_biases_and_routing_weights_of_any_dtype(cpu: Any) -> None:
    w13, w2 = (cpu.pack(quantize(torch.randn(4, n, 32), "mxfp4")) for n in (64, 32))
    x, ids, weights = torch.randn(3, 32), torch.randint(4, (3, 2)), torch.rand(3, 2).bfloat16()
    b13, b2 = torch.randn(4, 64).bfloat16(), torch.randn(32, 4).bfloat16().T
    wanted = cpu.moe(x, ids, weights.float(), w13, w2, GPT_OSS, b13=b13.float(), b2=b2.float().contiguous())
    assert torch.equal(cpu.moe(x, ids, weights, w13, w2, GPT_OSS, b13=b13, b2=b2), wanted)
    assert torch.equal(cpu.moe(x, ids.int(), weights, w13, w2, GPT_OSS, b13=b13, b2=b2), wanted)
    spread = x.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(cpu.moe(spread, ids, weights, w13, w2, GPT_OSS, b13=b13, b2=b2), wanted)
    one = {"weight_on_input": True, "act": FORMATS["mxfp8_e4m3"]}
    wanted = cpu.moe(x, ids[:, :1], weights[:, :1].float(), w13, w2, GPT_OSS, **one)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(cpu.moe(x, ids[:, :1], weights[:, :1].to(dtype), w13, w2, GPT_OSS, **one), wanted)


@pytest.mark.parametrize("act", [None, "mxfp8_e4m3", "nvfp4"])
def test_gradients_are_those_of_emulation(cpu: Any, act: str | None) -> None:
    q = quantize(torch.randn(24, 64), "nvfp4")
    x = torch.randn(5, 64, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    stored = None if act is None else FORMATS[act]
    grads = [
        torch.autograd.grad(m.linear(x, m.pack(q), bias, act=stored).square().sum(), (x, bias))
        for m in (cpu, emulation)
    ]
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_forked_child_runs_on_threads_of_its_own(cpu: Any, threads: Any) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    threads(2)
    w, x = cpu.pack(quantize(torch.randn(256, 64), "mxfp4")), torch.randn(3, 64)
    wanted = cpu.linear(x, w)
    child = os.fork()
    if child == 0:  # nothing of pytest may run on in here
        os._exit(0 if torch.equal(cpu.linear(x, w), wanted) else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(cpu.linear(x, w), wanted)


@pytest.mark.parametrize("name", [None, "mxfp8_e4m3", "nvfp4", "fp8_group128"])
def test_torch_compile_sees_one_graph(cpu: Any, name: str | None) -> None:
    act = None if name is None else get_format(name)
    w = cpu.pack(quantize(torch.randn(24, 64), "nvfp4"))
    w13, w2 = (cpu.pack(quantize(torch.randn(4, n, 64), "mxfp4")) for n in (128, 64))
    bias = torch.randn(24)

    def both(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = cpu.moe(x, ids, weights, w13, w2, GPT_OSS, act=act)
        return cpu.linear(x, w, bias, act=act) * 2, y + 1

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for m in (3, 5):
            x, ids, weights = torch.randn(m, 64).bfloat16(), torch.randint(4, (m, 2)), torch.rand(m, 2)
            for found, wanted in zip(compiled(x, ids, weights), both(x, ids, weights), strict=True):
                assert torch.equal(found, wanted)


def test_torch_compile_keeps_gradients(cpu: Any) -> None:
    """With a break in its graph: it sees operators of the core, which have none."""
    layer = QuantLinear(quantize(torch.randn(24, 64), "nvfp4"), torch.randn(24), Placer(force="cpu"))
    w13, w2 = (cpu.pack(quantize(torch.randn(4, n, 64), "mxfp4")) for n in (128, 64))
    x, ids, weights = torch.randn(5, 64), torch.randint(4, (5, 2)), torch.rand(5, 2)

    def both(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return layer(2 * x).square().sum() + cpu.moe(x + 1, ids, weights, w13, w2, GPT_OSS).square().sum()

    leaves = x.requires_grad_(), weights.requires_grad_()
    compiled = torch.compile(both, backend="aot_eager")
    grads = [torch.autograd.grad(function(*leaves), leaves) for function in (compiled, both)]
    for found, wanted in zip(*grads, strict=True):
        assert torch.equal(found, wanted)


def test_what_is_recorded_is_computed_when_it_is_replayed(cpu: Any) -> None:
    """By a tracer, and by a mode that hands out proxies: neither sees what the core does to memory."""
    from torch.fx.experimental.proxy_tensor import make_fx

    w = cpu.pack(quantize(torch.randn(24, 64), "nvfp4"))
    w13, w2 = (cpu.pack(quantize(torch.randn(4, n, 64), "mxfp4")) for n in (128, 64))
    bias, ids, weights = torch.randn(24), torch.randint(4, (3, 2)), torch.rand(3, 2)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cpu.linear(x, w, bias), cpu.moe(x, ids, weights, w13, w2, GPT_OSS)

    seen, other = torch.randn(3, 64), torch.randn(3, 64)
    for record in (torch.jit.trace, lambda f, x: make_fx(f)(x)):
        with torch.no_grad():
            found = record(both, seen)(other)
        for y, wanted in zip(found, both(other), strict=True):
            assert torch.equal(y, wanted)


def test_gradients_come_through_a_mode_that_looks_on(cpu: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    w = cpu.pack(quantize(torch.randn(24, 64), "nvfp4"))
    x = torch.randn(3, 64, requires_grad=True)
    wanted = torch.autograd.grad(cpu.linear(x, w).square().sum(), x)
    with FlopCounterMode(display=False):
        found = torch.autograd.grad(cpu.linear(x, w).square().sum(), x)
    assert torch.equal(found[0], wanted[0])


def test_operators_keep_what_they_promise_torch(cpu: Any) -> None:
    w = cpu.pack(quantize(torch.randn(24, 64), "nvfp4"))
    w13, w2 = (cpu.pack(quantize(torch.randn(4, n, 64), "mxfp4")) for n in (128, 64))
    x, bias = torch.randn(3, 64), torch.randn(24)
    ops = torch.ops.microscale
    torch.library.opcheck(ops.linear.default, (x, w.buffer, w.outer, 24, bias))
    torch.library.opcheck(ops.linear.default, (x, w.buffer, w.outer, 24, bias, torch.rand(3)))
    a = GPT_OSS
    fields = (a.kind, a.gated, a.interleaved, a.alpha, a.beta, a.limit)
    weights = (w13.buffer, None, w2.buffer, None, 4, 64)
    routes = (torch.randint(4, (3, 2)), torch.rand(3, 2))
    torch.library.opcheck(ops.moe.default, (x, *routes, *weights, *fields, None, None, None, False))
    stored = (None, None, None, False, "nvfp4", torch.rand(3))
    torch.library.opcheck(ops.moe.default, (x, *routes, *weights, *fields, *stored))
