"""`quantize` against the integer oracle: midpoints, scale rules at their edges, NaN and infinity, shapes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import integer_oracle as oracle
from microscale import FORMATS, QuantTensor, dequantize, get_format, quant, quantize
from microscale.elements import unpack_codes
from microscale.formats import MX_RULES

INF, NAN = math.inf, math.nan
ALL = [*FORMATS, "fp8_group128"]
MX = [name for name in FORMATS if FORMATS[name].rules == MX_RULES]
by_name = pytest.mark.parametrize("name", ALL)
with_rule = pytest.mark.parametrize("name, rule", [(n, r) for n in ALL for r in get_format(n).rules])


def codes_of(q: QuantTensor) -> Tensor:
    """One code a byte."""
    return unpack_codes(q.codes, q.format.element.bits, q.shape[-1])


def bits_of(scales: Tensor) -> Tensor:
    return scales.view(torch.int32) if scales.dtype == torch.float32 else scales.int()


def assert_same(a: QuantTensor, b: QuantTensor) -> None:
    assert (a.format, a.shape) == (b.format, b.shape)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(bits_of(a.scales), bits_of(b.scales))


def assert_oracle(x: Tensor, q: QuantTensor, rule: str) -> None:
    """Codes and scales of a float32 matrix, bit for bit."""
    fmt, (n, k), (height, width) = q.format, x.shape, q.format.block
    outer = None if q.tensor_scale is None else q.tensor_scale.expand(n).tolist()
    numbers = [[oracle.from_float(v) for v in row] for row in x.tolist()]
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(fmt.scale_shape(n, k), dtype=torch.int64)
    for r in range(0, n, height):
        for c in range(0, k, width):
            block = [v for row in numbers[r : r + height] for v in row[c : c + width]]
            scale = None if outer is None else Fraction(outer[r])
            stored, found = oracle.quantize_block(block, fmt.element.name, fmt.scale, rule, scale)
            scales[r // height, c // width] = stored
            shape = codes[r : r + height, c : c + width].shape
            codes[r : r + height, c : c + width] = torch.tensor(found, dtype=torch.uint8).view(shape)
    assert torch.equal(bits_of(q.scales), scales.int())
    assert torch.equal(codes_of(q), codes)


def spread(*shape: int) -> Tensor:
    """Normal numbers times powers of two that differ by row and by column."""
    exponents = torch.randint(-6, 7, (*shape[:-1], 1)) + torch.randint(-3, 4, shape)
    return torch.randn(shape) * torch.exp2(exponents)


def largest_amax(element, rule: str) -> float:
    """The largest float32 amax that the rule stores with scale 1."""
    if rule in ("ceil", "amax"):
        return element.max
    top = 2.0 if rule == "floor" else 2 - 2.0 ** (-element.mantissa_bits - 1)
    return float(np.nextafter(np.float32(top), np.float32(0))) * 2.0**element.emax


def around_midpoints(element, rule: str, exponent: int) -> Tensor:
    """Blocks of 16: an amax that fixes the scale at 2^exponent; codes and midpoints, each +-1 float32 ulp."""
    values = np.array([float(m) for m in oracle.magnitudes(element.name)])
    exact = largest_amax(element, rule) * 2.0**exponent
    amax = np.float32(exact)
    if float(amax) > exact:  # a subnormal, rounded up
        amax = np.nextafter(amax, np.float32(0))
    values = np.concatenate([values, (values[1:] + values[:-1]) / 2, np.linspace(element.max, exact, 9)])
    with np.errstate(over="ignore"):
        at = (values * 2.0**exponent).astype(np.float32)
        near = np.concatenate([np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(INF))])
    near = near[near <= amax]
    near = np.concatenate([near, -near])
    rows = np.resize(near, (-(-near.size // 15), 15))
    return torch.from_numpy(np.insert(rows, 0, amax, axis=1))


@with_rule
@pytest.mark.parametrize("end", ["lowest", "middle", "highest"])
def test_every_midpoint_and_its_neighbours(name, rule, end):
    fmt = get_format(name)
    lowest, highest = (-127, 127 - fmt.element.emax) if fmt.scale == "e8m0" else (-100, 100)
    exponent = {"lowest": lowest, "middle": int(torch.randint(-60, 61, ())), "highest": highest}[end]
    x = around_midpoints(fmt.element, rule, exponent)
    outer = 2.0 ** (exponent - 3) if fmt.tensor_scale else None
    q = quantize(x, fmt, rule=rule, tensor_scale=outer)
    stored = {"e8m0": exponent + 127, "e4m3": 0x50, "f32": 2.0**exponent}[fmt.scale]  # 0x50 is 8
    assert (q.scales == stored).all()
    assert_oracle(x, q, rule)


@pytest.mark.parametrize(
    "name, rule, amax, byte, code",
    [
        ("mxfp4", "even", 7.0, 128, 6),  # mantissa 1.75 rounds up: scale 2, 3.5 ties to 4
        ("mxfp4", "even", float(np.nextafter(np.float32(7), np.float32(0))), 127, 7),
        ("mxfp4", "floor", float(np.nextafter(np.float32(8), np.float32(0))), 127, 7),
        ("mxfp4", "floor", 8.0, 128, 6),
        ("mxfp4", "ceil", 6.0, 127, 7),
        ("mxfp4", "ceil", float(np.nextafter(np.float32(6), np.float32(7))), 128, 5),
        ("mxfp4", "ceil", 3.0, 126, 7),
        ("mxfp6_e2m3", "even", 7.75, 128, 24),  # 1.9375
        ("mxfp6_e3m2", "even", 30.0, 128, 28),  # 1.875
        ("mxfp8_e4m3", "even", 496.0, 128, 0x78),  # 1.9375
        ("mxfp8_e4m3", "ceil", 448.0, 127, 0x7E),
        ("mxfp8_e4m3", "ceil", 450.0, 128, 0x76),
        ("mxfp8_e5m2", "floor", 65535.0, 127, 0x7B),
        ("mxint8", "floor", 1.999, 127, 127),
        ("mxint8", "ceil", 1.999, 128, 64),
        ("nvfp4", "amax", 2688.0, 0x7E, 7),
        ("fp8_group128", "amax", 448.0, 1.0, 0x7E),
    ],
)
def test_by_hand(name, rule, amax, byte, code):
    q = quantize(torch.tensor([[amax]]), name, rule=rule)
    assert (q.scales.item(), codes_of(q).item()) == (byte, code)


@pytest.mark.parametrize("name", MX)
def test_floor_saturates_ceil_never_does(name):
    element = FORMATS[name].element
    x = torch.exp2(torch.rand(4096) * 200 - 100)[:, None]
    even, floor, ceil = (
        x.double() / torch.exp2(quantize(x, name, rule=r).scales.double() - 127) for r in MX_RULES
    )
    assert ((floor >= 2.0**element.emax) & (floor < 2.0 ** (element.emax + 1))).all()
    assert (floor > element.max).any()
    assert (even < 2.0 ** (element.emax + 1) * (1 - 2.0 ** (-element.mantissa_bits - 2))).all()
    assert ((ceil <= element.max) & (ceil > element.max / 2)).all()


@with_rule
@pytest.mark.parametrize("shape", [(3, 1), (3, 31), (3, 32), (2, 33), (5, 70), (1, 2880), (130, 17)], ids=str)
def test_random_numbers_and_ragged_blocks(name, rule, shape):
    x = spread(*shape)
    before = x.clone()
    q = quantize(x, name, rule=rule)
    assert torch.equal(x, before)
    assert (q.format, q.shape, q.rule) == (get_format(name), shape, rule)
    assert_oracle(x, q, rule)


@with_rule
@pytest.mark.parametrize("exponent", [-149, -140, -135, -127, -110, 127])
def test_the_ends_of_float32(name, rule, exponent):
    x = ((torch.rand(40, 32, dtype=torch.float64) * 4 - 2) * 2.0**exponent).float()
    x.nan_to_num_()  # what rounded to infinity is float32's largest
    x[0], x[1, :16] = 0, 0
    q = quantize(x, name, rule=rule)
    assert_oracle(x, q, rule)
    if get_format(name).block[0] == 1:
        assert not codes_of(q)[0].any()


@by_name
def test_a_zero_block_as_documented(name):
    fmt = get_format(name)
    x = torch.zeros(130, 256)
    x[0, 1] = -0.0
    x[:, 128:] = 1.0
    q = quantize(x, name)
    blocks = 128 // fmt.block[1]
    assert (q.scales[:, :blocks] == {"e8m0": 0, "e4m3": 1, "f32": 1.0}[fmt.scale]).all()
    codes = codes_of(q)[:, :128]
    assert codes[0, 1] == (0 if name == "mxint8" else 1 << fmt.element.bits - 1)
    codes[0, 1] = 0
    assert not codes.any()
    assert torch.equal(dequantize(q)[:, :128], torch.zeros(130, 128))


@by_name
@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF, 1e39], ids=["nan", "-nan", "inf", "-inf", "1e39"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_is_not_finite_spoils_its_block_only(name, bad, dtype):
    fmt = get_format(name)
    x = spread(150, 300).clamp(-500, 500).to(dtype)
    r, c = int(torch.randint(150, ())), int(torch.randint(300, ()))
    # The amax of all, in another block of the same row: NVFP4's tensor scale must still see it.
    x[r, (c + 150) % 300] = 600
    clean = x.clone()
    x[r, c], clean[r, c] = torch.tensor(bad, dtype=torch.float64).to(dtype), 0
    q, want = quantize(x, fmt), quantize(clean, fmt)
    top, left = r // fmt.block[0] * fmt.block[0], c // fmt.block[1] * fmt.block[1]
    spoilt = torch.zeros(150, 300, dtype=torch.bool)
    spoilt[top : top + fmt.block[0], left : left + fmt.block[1]] = True
    assert torch.equal(dequantize(q).isnan(), spoilt)
    assert not codes_of(q)[spoilt].any()
    assert torch.equal(codes_of(q)[~spoilt], codes_of(want)[~spoilt])
    others = torch.ones(q.scales.shape, dtype=torch.bool)
    others[r // fmt.block[0], c // fmt.block[1]] = False
    assert torch.equal(q.scales[others], want.scales[others])
    assert bits_of(q.scales)[~others].item() == {"e8m0": 255, "e4m3": 0x7F, "f32": 0x7FC00000}[fmt.scale]
    if fmt.tensor_scale:
        assert torch.equal(q.tensor_scale, want.tensor_scale)


@by_name
@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0), (0, 5, 40), (2, 0, 40), (2, 3, 0)], ids=str)
def test_empty(name, shape):
    fmt, q = get_format(name), quantize(torch.zeros(shape), name)
    assert (q.shape, dequantize(q).shape) == (shape, shape)
    assert q.codes.shape == (*shape[:-1], fmt.packed_columns(shape[-1]))
    assert q.scales.shape == (*shape[:-2], *fmt.scale_shape(*shape[-2:]))


@by_name
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 3, 5, 40), (2, 200, 150)], ids=str)
def test_leading_dimensions_are_matrices(name, shape):
    x = spread(*shape)
    q = quantize(x, name)
    each = [quantize(m, name) for m in x.reshape(-1, *shape[-2:])]
    assert torch.equal(q.codes.flatten(), torch.cat([m.codes.flatten() for m in each]))
    assert torch.equal(q.scales.flatten(), torch.cat([m.scales.flatten() for m in each]))
    assert torch.equal(dequantize(q).flatten(), torch.cat([dequantize(m).flatten() for m in each]))


@pytest.mark.parametrize("name", [n for n in ALL if get_format(n).block[0] == 1])
def test_a_vector_is_a_row(name):
    x = spread(70)
    vector, row = quantize(x, name), quantize(x[None], name)
    assert (vector.shape, vector.codes.dim(), vector.scales.dim()) == ((70,), 1, 1)
    assert torch.equal(vector.codes, row.codes[0])
    assert torch.equal(vector.scales, row.scales[0])
    assert torch.equal(dequantize(vector), dequantize(row)[0])


@by_name
def test_strides_do_not_matter(name):
    base = spread(300, 300)
    for x in (base.T, base[::2, 1::3], base[:, :70], base[0].expand(140, 300)):
        assert not x.is_contiguous()
        assert_same(quantize(x, name), quantize(x.contiguous(), name))


@by_name
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_input_dtypes(name, dtype):
    x = (torch.randn(140, 140, dtype=torch.float64) * 3).to(dtype)
    before = x.clone()
    assert_same(quantize(x, name), quantize(x.float(), name))
    assert torch.equal(x.double(), before.double())
    if dtype == torch.float64:  # finite, but not in float32
        assert dequantize(quantize(x.fill_(1e39), name)).isnan().all()


@by_name
def test_a_parameter_is_quantised_as_data(name):
    q = quantize(torch.nn.Parameter(spread(3, 40)), name)
    assert not any(t.requires_grad for t in (q.codes, q.scales, q.tensor_scale) if t is not None)


@with_rule
def test_the_chunk_does_not_show(name, rule, monkeypatch):
    x = spread(2, 260, 70)
    whole = quantize(x, name, rule=rule)
    for chunk in (1, 10000):
        monkeypatch.setattr(quant, "CHUNK", chunk)
        assert_same(quantize(x, name, rule=rule), whole)


@pytest.mark.parametrize("given", ["default", 1.0, 0.01, 3e-5, 100.0], ids=str)
def test_nvfp4_block_scale_as_defined(given):
    x = spread(60, 48) * torch.exp2(torch.randint(-9, 4, (60, 1)))
    q = quantize(x, "nvfp4", tensor_scale=None if given == "default" else given)
    outer = np.float32(x.abs().max().item()) / np.float32(2688) if given == "default" else np.float32(given)
    assert q.tensor_scale.item() == outer.item()
    amax = x.unflatten(1, (3, 16)).abs().amax(-1).numpy()
    replay = np.clip(amax / np.float32(6) / outer, np.float32(2.0**-9), np.float32(448))
    assert torch.equal(q.scales, torch.from_numpy(replay).to(torch.float8_e4m3fn).view(torch.uint8))
    known = oracle.magnitudes("e4m3")
    for a, byte in zip(amax.flatten().tolist(), q.scales.flatten().tolist(), strict=True):
        exact = min(max(Fraction(a) / 6 / Fraction(outer.item()), known[1]), known[-1])
        nearest = known[oracle.encode("e4m3", (0, exact))]
        assert abs(known[byte] - exact) <= abs(nearest - exact) + exact * oracle.power(-22)
    assert_oracle(x, q, "amax")
