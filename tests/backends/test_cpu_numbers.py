"""The C++ core's numbers at every level: exact decoding, and results that depend on nothing they should not."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from odd_numbers import odd_numbers

from microscale.activations import GPT_OSS, Activation
from microscale.conformance import ACTIVATIONS, Case, cases, run
from microscale.elements import pack_codes
from microscale.formats import FORMATS, FP8_GROUP128, Format, get_format
from microscale.machine import detect
from microscale.operands import stored, stored_apart
from microscale.quant import QuantTensor, dequantize, quantize
from microscale.tolerance import moe_budget

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTS = (*(n for n, f in FORMATS.items() if f.block[0] == 1), FP8_GROUP128.name)  # formats of activations


CASES = list(cases(large=True))
# Experts whose intermediate ends inside a block, of activations that share a scale or a multiplier along a row.
CASES += [
    Case("moe", weight, m, 200, 288, act=act, experts=4, top_k=2, activation=kind, padded=m > 1)
    for weight, act in (
        ("nvfp4", "a4"),
        ("fp8_block128", "a8"),
        ("mxfp4", "nvfp4"),
        ("nvfp4", "fp8_group128"),
    )
    for m, kind in (
        (0, GPT_OSS),
        (1, GPT_OSS),
        (70, Activation("silu")),
        (9, Activation("relu2", gated=False)),
    )
]
CASES += [
    Case(
        "moe",
        "mxfp4",
        9,
        72,
        96,
        act,
        experts=4,
        top_k=1,
        activation=Activation("silu"),
        weight_on_input=True,
    )
    for act in ("mxfp8_e4m3", "nvfp4", "fp8_group128")
]
LARGE = [
    c for c in CASES if c.op == "moe" and c.k == 2880
]  # four seconds each, nearly all of them for float64


@pytest.mark.parametrize("case", [c for c in CASES if c not in LARGE], ids=lambda c: c.name)
def test_every_level_is_within_the_kernel_error_budget(cpu: Any, level: str, case: Case, seed: int) -> None:
    worst = run(case, cpu, "cpu", torch.Generator().manual_seed(seed))
    assert worst <= 1.0, f"error is {worst:.3g} times the permitted one"


@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.name)
def test_experts_of_a_real_size_at_the_widest_level(cpu: Any, case: Case, seed: int) -> None:
    assert run(case, cpu, "cpu", torch.Generator().manual_seed(seed)) <= 1.0


@pytest.mark.parametrize(
    "activation", [a for a in ACTIVATIONS if a.kind.startswith(("silu", "swiglu", "situ"))], ids=str
)
def test_gates_may_be_far_below_zero(cpu: Any, level: str, activation: Activation) -> None:
    """A sigmoid that stays above 0 there is a number again once it is times 2^40; nothing else is in these sums."""
    w13, w2 = (quantize(torch.randn(2, *s), "mxfp8_e4m3") for s in ((activation.rows(1), 64), (24, 1)))
    packed, ids, weights = (cpu.pack(w13), cpu.pack(w2)), torch.randint(2, (20, 1)), torch.rand(20, 1)
    for dtype in (torch.bfloat16, torch.float32):
        x = (torch.randn(20, 64) * torch.exp2(2.0 * torch.arange(20))[:, None]).to(dtype)
        y = cpu.moe(x, ids, weights, *packed, activation)
        assert moe_budget(x, ids, weights, w13, w2, activation).worst(y) <= 1.0, dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTS)
def test_the_intermediate_is_stored_as_quantize_does(
    cpu: Any, level: str, name: str, dtype: torch.dtype, seed: int
) -> None:
    """Squares of numbers through two unit matrices: one rounding before they are stored, and none behind."""
    generator, act = torch.Generator().manual_seed(seed), get_format(name)
    for width, m in ((1, 2), (33, 37), (96, 1), (128, 20), (300, 3), (300, 900)):
        unit = cpu.pack(quantize(torch.eye(width)[None], "mxfp8_e4m3"))
        size = torch.exp2(torch.randint(-6, 6, (m, -(-width // 16)), generator=generator).float())
        x = torch.randn(m, width, generator=generator) * size.repeat_interleave(16, 1)[:, :width]
        x[m // 2] = 0.0
        x[m - 1, width // 2] = math.inf if width % 2 else math.nan
        x, nothing = x.to(dtype), torch.full((m, width), math.nan, dtype=dtype)
        ids, weights = torch.zeros(m, 1, dtype=torch.int64), torch.ones(m, 1)
        args = (ids, weights, unit, unit, Activation("relu2", gated=False))
        assert cpu.moe(nothing, *args, act=act).isnan().all()  # and its memory is used again
        wanted = stored(stored(x, act, torch.float32).clamp(min=0).square(), act, torch.float32).to(dtype)
        wanted[m - 1] = math.nan  # a product with what is not a number
        torch.testing.assert_close(cpu.moe(x, *args, act=act), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTS)
def test_activations_are_stored_as_quantize_does(
    cpu: Any, level: str, name: str, dtype: torch.dtype, seed: int
) -> None:
    """To the bit, the sign of zero included; rows that lie apart, too."""
    generator, act = torch.Generator().manual_seed(seed), get_format(name)
    for k in (1, 31, 32, 33, 128, 129, 1100):
        x = odd_numbers(k, dtype, generator)
        apart = torch.full((len(x), k + 5), math.nan, dtype=dtype)
        apart[:, :k] = x
        for to in (torch.float32, torch.bfloat16) if act.scale == "e8m0" else (torch.float32,):
            wanted = stored(x, act, to)
            for rows in (x, apart[:, :k]):
                y = cpu.cpu_core.stored(rows, act, to)
                torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(y.signbit() & ~y.isnan(), wanted.signbit() & ~wanted.isnan())
    assert cpu.cpu_core.stored(torch.zeros(0, 5, dtype=dtype), act, torch.float32).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multipliers_of_rows_are_those_of_quantize(
    cpu: Any, level: str, dtype: torch.dtype, seed: int
) -> None:
    """What is left of NVFP4's numbers without them has as many bits as bfloat16."""
    generator, act = torch.Generator().manual_seed(seed), FORMATS["nvfp4"]
    for k in (1, 16, 33, 1100):
        x = odd_numbers(k, dtype, generator)
        numbers, outer = stored_apart(x, act, torch.bfloat16)
        torch.testing.assert_close(
            numbers.float() * outer[:, None], stored(x, act, torch.float32), rtol=0, atol=0, equal_nan=True
        )
        found = torch.empty(len(x))
        y = cpu.cpu_core.stored(x, act, torch.bfloat16, found)
        torch.testing.assert_close(y, numbers, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found, outer)


def scale_values(fmt: Format) -> torch.Tensor:
    """Every scale byte; of the 2^32 float32 scales some that are odd."""
    if fmt.scale != "f32":
        return torch.arange(256, dtype=torch.uint8)
    odd = [1.0, -3.3, 2.0**-126, 2.0**-149, 1.1e-40, 2.0**120, 1e30, 0.0, float("inf"), float("nan")]
    return torch.tensor(odd)


def every_code_and_scale(fmt: Format) -> QuantTensor:
    """One number to a row, at ever another place, among zeros: [scales * codes, block]; each with each."""
    scales, count = scale_values(fmt), 2**fmt.element.bits
    width = max(fmt.block[1], 32)
    n = len(scales) * count
    codes = torch.zeros(n, width, dtype=torch.uint8)
    row = torch.arange(n)
    codes[row, row % 31 % width] = (row % count).to(torch.uint8)
    if fmt.block[0] > 1:
        rows = scales.repeat_interleave(count // fmt.block[0])[:, None]
    else:
        rows = scales.repeat_interleave(count)[:, None].expand(n, width // fmt.block[1]).contiguous()
    outer = torch.ones(1) if fmt.tensor_scale else None
    return QuantTensor(fmt, (n, width), pack_codes(codes, fmt.element.bits), rows, outer)


def same(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Equal, or both NaN; zeros may differ in sign, for a sum begins at +0."""
    return (found == wanted) | (found.isnan() & wanted.isnan())


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_with_every_scale_is_decoded_exactly(cpu: Any, level: str, name: str) -> None:
    q = every_code_and_scale(FORMATS[name])
    y = cpu.linear(torch.ones(1, q.shape[1]), cpu.pack(q))[0]
    wanted = dequantize(q, torch.float64).sum(dim=1).float()
    right = same(y, wanted)
    bad = [(i, float(y[i]), float(wanted[i])) for i in (~right).nonzero().flatten().tolist()[:5]]
    assert right.all(), (
        f"{int((~right).sum())} of {len(y)} rows are wrong, such as (row, found, wanted) {bad}"
    )


@pytest.mark.parametrize("name", FORMATS)
def test_an_identity_reads_the_weights_back(cpu: Any, level: str, name: str) -> None:
    q = quantize(torch.randn(130, 288), name)
    q = replace(q, tensor_scale=None if q.tensor_scale is None else torch.full((130,), 0.375))
    y = cpu.linear(torch.eye(288), cpu.pack(q))
    assert torch.equal(y.T, dequantize(q))


@pytest.mark.parametrize("name", FORMATS)
def test_one_nan_scale_spoils_its_own_output_only(cpu: Any, level: str, name: str) -> None:
    fmt = FORMATS[name]
    q = quantize(torch.randn(300, 288), name)
    q.scales[-1, 1] = {"e8m0": 255, "e4m3": 0x7F, "f32": float("nan")}[fmt.scale]
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(5, 288).to(dtype)
        nan = cpu.linear(x, cpu.pack(q)).isnan()
        assert nan[:, -1].all()
        assert torch.equal(nan, dequantize(q).isnan().any(dim=1).expand(5, 300))


def problem(
    cpu: Any, name: str, m: int, dtype: torch.dtype, act: Format | None = None, width: int = 64
) -> tuple[Any, Any]:
    """(a linear, a MoE), each a function of the number of tokens and in all as many as `m`."""
    w = cpu.pack(quantize(torch.randn(72, 160), name))
    w13, w2 = (
        cpu.pack(quantize(torch.randn(6, *shape) / 8, name)) for shape in ((2 * width, 96), (96, width))
    )
    x, h = torch.randn(m, 160).to(dtype), torch.randn(m, 96).to(dtype)
    ids, weights = torch.rand(m, 6).argsort(dim=-1)[:, :3], torch.rand(m, 3)
    bias, b13, b2 = torch.randn(72), torch.randn(6, 2 * width), torch.randn(6, 96)
    options = {"b13": b13, "b2": b2, "act": act}
    return (
        lambda count: cpu.linear(x[:count], w, bias, act=act),
        lambda count: cpu.moe(h[:count], ids[:count], weights[:count], w13, w2, GPT_OSS, **options),
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_token_does_not_depend_on_the_tokens_beside_it(cpu: Any, level: str, name: str) -> None:
    """To the bit, whatever M: else a batch would change what a model says."""
    for dtype in (torch.bfloat16, torch.float32):
        for op in problem(cpu, name, 70, dtype):
            whole = op(70)
            for m in range(1, 70):
                assert torch.equal(op(m), whole[:m]), f"M = {m}, {dtype}"


@pytest.mark.parametrize(
    "weight, name", [("mxfp4", "mxfp8_e4m3"), ("nvfp4", "nvfp4"), ("fp8_block128", "fp8_group128")]
)
def test_stored_activations_depend_on_nothing_beside_them(
    cpu: Any, level: str, weight: str, name: str, threads: Any
) -> None:
    """Neither on other tokens nor on the number of threads; there are columns enough for several units."""
    for dtype in (torch.bfloat16, torch.float32):
        for op in problem(cpu, weight, 70, dtype, get_format(name), 144):
            threads(1)
            whole = op(70)
            for count in (1, 2, 3):
                threads(count)
                for m in (0, 1, 2, 5, 17, 33, 69, 70):
                    assert torch.equal(op(m), whole[:m]), f"M = {m}, {dtype}, {count} threads"


@pytest.mark.parametrize("name", FORMATS)
def test_the_number_of_threads_changes_nothing(cpu: Any, level: str, name: str, threads: Any) -> None:
    for m in (1, 19):
        for op in problem(cpu, name, m, torch.bfloat16):
            threads(1)
            wanted = op(m)
            for count in (2, 3, 5):
                threads(count)
                assert torch.equal(op(m), wanted), f"{count} threads"


@pytest.mark.parametrize("name", FORMATS)
def test_a_caller_that_flushes_subnormal_numbers_changes_nothing(
    cpu: Any, level: str, name: str, threads: Any
) -> None:
    """The pool's threads do not, and a result would depend on whose thread it came from."""
    few = cpu.pack(every_code_and_scale(FORMATS[name]))
    many = cpu.pack(quantize(torch.randn(4096, 256) * 2.0**-118, name))
    for count in (1, 2):
        threads(count)
        for w in (few, many):
            x = torch.ones(2, w.shape[1])
            wanted = cpu.linear(x, w)
            assert torch.set_flush_denormal(True)
            try:
                found = cpu.linear(x, w)
            finally:
                torch.set_flush_denormal(False)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_levels_agree_within_their_rounding(cpu: Any, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 operands: every level sums the same numbers, if in another order."""
    w, x = cpu.pack(quantize(torch.randn(64, 512), "mxfp6_e3m2")), torch.randn(7, 512)
    found = cpu.linear(x, w)
    monkeypatch.setenv("MICROSCALE_CPU_LEVEL", "plain")
    torch.testing.assert_close(found, cpu.linear(x, w), rtol=1e-4, atol=1e-3)


def test_required_levels_ran() -> None:
    """`MICROSCALE_TEST_LEVEL=amx` makes a run fail that would otherwise skip that level."""
    required = os.environ.get("MICROSCALE_TEST_LEVEL")
    if not required:
        pytest.skip("MICROSCALE_TEST_LEVEL is not set")
    assert detect().level == required
