"""What benchmarks are made of: shapes, weights without special cases, ceilings, and the arithmetic of times."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from microscale import env
from microscale.errors import BackendError, FormatError
from microscale.formats import FORMATS
from microscale.machine import cache_bytes, detect
from microscale.plan import stored_bytes

if not detect().core:
    pytest.skip(f"the C++ core is not in this installation: {detect().core_missing}", allow_module_level=True)

from microscale import _core
from microscale.backends import cpu
from microscale.bench import ceilings as ceilings_module
from microscale.bench.ceilings import Ceilings, Probe
from microscale.bench.layers import Call, DenseLayers, Layers, random_weight, routes
from microscale.bench.shapes import SHAPES, parse_shape
from microscale.bench.timing import FEWEST, LONG, Times, measure

SPECIAL = slice(12, 16)  # bytes of the flags in a packed buffer's header


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings_module, "_LEAST", 8 << 20)
    monkeypatch.setattr(ceilings_module, "_WINDOW", 2 << 20)


@pytest.fixture
def aligned() -> torch.Tensor:
    room = torch.ones((4 << 20) + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    return room[start : start + (4 << 20)]


@pytest.mark.parametrize("level", range(len(env.CPU_LEVELS)), ids=env.CPU_LEVELS)
def test_every_level_multiplies_at_some_rate(level: int) -> None:
    if level > _core.level():
        with pytest.raises(
            ValueError, match="multiply_rate: this processor, or this build, does not have that level"
        ):
            _core.multiply_rate(level, 1)
        return
    rate = _core.multiply_rate(level, 1)
    assert 1e7 < rate < 1e14


def test_wide_vectors_multiply_faster() -> None:
    """Neighbouring levels may run at one rate; vectors of four and of sixteen floats cannot."""
    if _core.level() < env.CPU_LEVELS.index("avx512"):
        pytest.skip("this CPU has no level wide enough to tell")
    narrow, wide = (
        max(_core.multiply_rate(env.CPU_LEVELS.index(word), 1) for _ in range(5))
        for word in ("plain", "avx512")
    )
    assert wide > narrow


def test_reads_have_some_rate(aligned: torch.Tensor) -> None:
    for size in (1024, 5 * 1024, 4 << 20):
        assert 1e6 < _core.read_rate(aligned.data_ptr(), size, 1) < 1e13
    assert _core.read_rate(aligned.data_ptr(), 4 << 20, 3) > 0


def test_what_the_probes_refuse(aligned: torch.Tensor) -> None:
    start = aligned.data_ptr()
    for args in (
        (start + 1, 1024, 1),
        (start, 1000, 1),
        (start, 0, 1),
        (start, -1024, 1),
        (start, 1024, 0),
        (0, 1024, 1),
    ):
        with pytest.raises(ValueError, match="read_rate: an argument is out of range"):
            _core.read_rate(*args)
    with pytest.raises(ValueError, match="multiply_rate: an argument is out of range"):
        _core.multiply_rate(0, 0)
    with pytest.raises(ValueError, match="level"):
        _core.multiply_rate(-1, 1)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted through Linux's /proc")
@pytest.mark.parametrize("probe", ["_core.multiply_rate(0, {})", "_core.read_rate(start, 1 << 22, {})"])
def test_probes_use_as_many_threads_as_they_are_told(probe: str) -> None:
    code = f"""
import ctypes, os
from microscale import _core
room = ctypes.create_string_buffer(b"1", (1 << 22) + 64)
start = (ctypes.addressof(room) + 63) // 64 * 64
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
{probe.format(1)}
one = count() - before
{probe.format(3)}
print(one, count() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "2"]


def test_one_thread_takes_one_processors_time() -> None:
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(5):
        _core.multiply_rate(0, 1)
    assert time.process_time() - used <= 1.2 * (time.perf_counter() - wall)


def test_probe_goes_round_and_takes_medians() -> None:
    probe = Probe("plain", 1, cache=1 << 20, memory=1 << 30)
    for _ in range(6):
        seen = probe.once()
        assert seen.read > 0
        assert seen.multiply > 0
    assert len(probe.reads) == len(probe.multiplies) == 6
    assert probe.since(5) == Ceilings(probe.reads[5], probe.multiplies[5])
    other = probe.at(env.CPU_LEVELS[_core.level()])
    other.once()
    assert (len(other.reads), len(probe.reads)) == (1, 6)


def test_probe_takes_a_quarter_of_the_memory_at_most() -> None:
    assert Probe("plain", 1, cache=1 << 30, memory=16 << 20).once().read > 0


def test_caches_of_this_machine() -> None:
    assert 0 <= cache_bytes() < 1 << 36


def test_floor() -> None:
    c = Ceilings(read=10.0, multiply=100.0)
    assert c.floor(bytes=50, flops=100) == 5.0
    assert c.floor(bytes=1, flops=1000) == 10.0


def test_times() -> None:
    times = Times((1.0, 4.0, 2.0), (10, 10, 30), 60, Ceilings(read=20.0, multiply=100.0))
    assert times.median == 2.0
    assert times.read_rate == 10.0
    assert times.flop_rate == 30.0
    assert times.bound == "compute"  # 60 / 100 s, against 10 / 20 s
    assert times.of_floor == 0.6  # 0.6 / 1, 0.6 / 4, 1.5 / 2
    assert times.document()["seconds_min"] == 1.0
    assert Times((1.0,), (10,), 1, Ceilings(20.0, 100.0)).bound == "memory"


def test_kinds_are_timed_in_turn_and_each_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = [0.0], []
    monkeypatch.setattr(time, "sleep", lambda s: log.append(("sleep", s)))

    def fresh(name: str, seconds: float) -> Call:
        def run() -> torch.Tensor:
            log.append((name, seconds))
            clock[0] += seconds
            return torch.zeros(0)

        return Call(run, 7, 9, 0, torch.zeros(0))

    class Still:
        reads: tuple[float, ...] = ()

        def once(self) -> None:
            log.append(("probe", 0.0))

        def since(self, first: int) -> Ceilings:
            return Ceilings(1.0, 1.0)

    still: Any = Still()
    a, b = measure(
        [partial(fresh, "a", 0.1), partial(fresh, "b", 2 * LONG)], still, 2, pause=0.5, clock=lambda: clock[0]
    )
    words = [name for name, _ in log]
    assert words == ["probe", "sleep", "a", "a", "sleep", "b", "b", "probe", "sleep", "a", "a", "sleep", "b"]
    assert a.seconds == pytest.approx((0.1, 0.1))
    assert b.seconds == pytest.approx((2 * LONG, 2 * LONG))
    assert (a.bytes, a.flops) == ((7, 7), 9)
    (long,) = measure([partial(fresh, "c", 3.0)], still, 15, clock=lambda: clock[0])
    assert len(long.seconds) == FEWEST


@pytest.mark.parametrize("name", FORMATS)
def test_random_weights_are_ordinary(name: str, generator: torch.Generator) -> None:
    """No NaN, no infinity, nothing that kernels treat apart, and products of the size of their activations."""
    for shape in ((48, 320), (3, 32, 100)):
        w = random_weight(FORMATS[name], shape, generator)
        packed = cpu.pack(w)
        assert packed.buffer[SPECIAL].tolist() == [0, 0, 0, 0]
        back = cpu.unpack(packed)
        assert torch.equal(back.codes, w.codes)
        assert torch.equal(back.scales, w.scales)
    y = cpu.linear(torch.randn(8, 320), cpu.pack(random_weight(FORMATS[name], (48, 320), generator)))
    assert 0.2 < float(y.std()) < 5


def test_routes(generator: torch.Generator) -> None:
    ids, weights = routes(7, 5, 3, generator)
    assert ids.shape == weights.shape == (7, 3)
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert torch.allclose(weights.sum(-1), torch.ones(7))


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_stored(name: str) -> None:
    fmt = FORMATS[name]
    for shape in (SHAPES["gpt-oss-20b"], SHAPES["qwen3-30b-a3b"], SHAPES["5120x2880"]):
        stored = sum(stored_bytes(name, m) - 4 * fmt.tensor_scale for m in shape.matrices)
        assert shape.bytes(fmt) == stored


def test_flops() -> None:
    assert parse_shape("6x5").flops(3) == 2 * 3 * 6 * 5
    assert parse_shape("8x2x64x32").flops(3) == 2 * 3 * 2 * (64 * 64 + 64 * 32)
    assert SHAPES["gpt-oss-20b"].flops(1) == 2 * 4 * 3 * 2880 * 2880


@pytest.mark.parametrize(
    "text", ["", "gpt-oss", "4", "4x", "4x4x4", "axb", "4x4x4x4x4", "0x4", "4x9999999", "2x3x32x32"]
)
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(FormatError):
        parse_shape(text)


def test_layers_are_taken_in_turn_and_are_the_same(generator: torch.Generator) -> None:
    shape, fmt = parse_shape("4x2x64x32"), FORMATS["mxfp4"]
    each = 4 * shape.bytes(fmt)
    layers = Layers(shape, fmt, cache=each // 2, memory=100 * each, generator=generator)
    assert len(layers.packed) == 2
    assert layers.bytes >= 2 * each
    calls = [layers.call(3) for _ in range(3)]
    assert [c.layer for c in calls] == [0, 1, 0]
    assert all(p.buffer.data_ptr() % 64 == 0 for layer in layers.packed for p in layer)
    for call in calls:
        assert call.routes is not None
        assert call.bytes == shape.bytes(fmt) * len(set(call.routes[0].flatten().tolist()))
        assert call.run().shape == (3, 64)
    first, second = (
        cpu.moe(calls[0].x, *calls[0].routes, *layer, shape.activation) for layer in layers.packed
    )
    assert torch.equal(first, second)


def test_layers_stay_within_memory(generator: torch.Generator) -> None:
    shape, fmt = parse_shape("64x64"), FORMATS["mxfp4"]
    each = shape.bytes(fmt)
    assert len(Layers(shape, fmt, cache=100 * each, memory=5 * each, generator=generator).packed) == 5
    with pytest.raises(BackendError, match="64x64 in mxfp4 takes"):
        Layers(shape, fmt, cache=1, memory=each, generator=generator)


def test_dense_layers_are_taken_in_turn_and_stay_within_memory(generator: torch.Generator) -> None:
    shape, each = parse_shape("64x96"), 2 * 64 * 96
    layers = DenseLayers(shape, torch.bfloat16, cache=each, memory=3 * each, generator=generator)
    assert len(layers.weights) == 3
    calls = [layers.call(2) for _ in range(4)]
    assert [c.layer for c in calls] == [0, 1, 2, 0]
    assert {(c.bytes, c.flops) for c in calls} == {(each, 2 * 2 * 64 * 96)}
    assert len({w.data_ptr() for w in layers.weights}) == 3
    for call in calls:
        exact = call.x.double() @ layers.weights[call.layer].double().T
        assert (call.run().double() - exact).abs().max() <= 2.0**-7 * exact.abs().max()
    with pytest.raises(BackendError, match=r"64x96 in bf16 takes 0\.0 GB to make, and 0\.0 GB may be used"):
        DenseLayers(shape, torch.bfloat16, cache=each, memory=2 * each - 1, generator=generator)
