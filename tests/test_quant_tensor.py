"""`QuantTensor` as data, properties of the round trip, NVFP4's tensor scale, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from microscale import FORMATS, FormatError, QuantTensor, dequantize, get_format, quantize
from microscale.formats import MX_RULES
from microscale.scales import scale_value

ALL = [*FORMATS, "fp8_group128"]
MX = [name for name in FORMATS if FORMATS[name].rules == MX_RULES]
by_name = pytest.mark.parametrize("name", ALL)
with_rule = pytest.mark.parametrize("name, rule", [(n, r) for n in ALL for r in get_format(n).rules])
examples = settings(max_examples=25, deadline=None, database=None)


@st.composite
def matrices(draw, exponents: tuple[int, int] = (-170, 104), max_rows: int = 3) -> Tensor:
    """float32 [n, k]: 24-bit integers times powers of two within 2^22 of a common one."""
    shape = draw(st.tuples(st.integers(1, max_rows), st.integers(1, 70)))
    numbers = draw(arrays.arrays(np.int32, shape, elements=st.integers(-(2**24) + 1, 2**24 - 1)))
    falls = draw(arrays.arrays(np.int32, shape, elements=st.integers(0, 22)))
    exponent = draw(st.integers(*exponents))
    return torch.from_numpy(np.ldexp(numbers.astype(np.float64), exponent - falls).astype(np.float32))


def multipliers(q: QuantTensor) -> Tensor:
    """float64 [n, k]: scale times tensor scale at every element of a matrix."""
    (n, k), (height, width) = q.shape, q.format.block
    scales = scale_value(q.scales, q.format, torch.float64)
    scales = scales.repeat_interleave(height, 0)[:n].repeat_interleave(width, 1)[:, :k]
    return scales if q.tensor_scale is None else scales * q.tensor_scale.double().expand(n)[:, None]


def same(a: QuantTensor, b: QuantTensor) -> bool:
    return a.shape == b.shape and torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


@with_rule
@examples
@given(data=st.data())
def test_no_code_is_nearer_than_the_one_chosen(name, rule, data):
    # float64 holds all of it exactly. So the error is half a step at most, or the distance to saturation.
    fmt = get_format(name)
    x = data.draw(matrices((-170, 104) if fmt.scale == "e8m0" else (-90, 104)))
    q = quantize(x, fmt, rule=rule)
    values = torch.tensor(sorted({v for v in fmt.element.values if abs(v) <= fmt.element.max}))
    possible = values.double() * multipliers(q)[..., None]
    best = (possible - x.double()[..., None]).abs().amin(-1)
    error = (dequantize(q, torch.float64) - x.double()).abs()
    # Division by a scale that is no power of two is rounded, so there a tie may fall to either side.
    slack = 0 if fmt.scale == "e8m0" else 2.0**-21
    assert (error <= best + slack * x.double().abs()).all()
    if rule == "ceil" and int(q.scales.max()) < 254:
        assert (error <= fmt.element.max * 2.0 ** (-fmt.element.mantissa_bits - 1) * multipliers(q)).all()


@with_rule
@examples
@given(data=st.data())
def test_values_survive_a_second_round(name, rule, data):
    fmt = get_format(name)
    # Below 2^126, so that what is rounded up stays within float32.
    x = data.draw(matrices((-170, 102) if fmt.scale == "e8m0" else (-90, 102)))
    q = quantize(x, fmt, rule=rule)
    if fmt.tensor_scale:
        again = quantize(dequantize(q), fmt, tensor_scale=q.tensor_scale)
        # A scale below 2^-6 is an E4M3 subnormal, too coarse for the block's amax to reach code 6.
        kept = (q.scales >= 8).repeat_interleave(16, 1)[:, : x.shape[1]]
        assert torch.equal(dequantize(again)[kept], dequantize(q)[kept])
        return
    again = quantize(dequantize(q), fmt, rule=rule)
    if fmt.scale == "f32":  # 448 * scale / 448 may be off by one float32 ulp
        assert torch.equal(again.codes, q.codes)
        torch.testing.assert_close(again.scales, q.scales, rtol=2**-23, atol=0)
    else:
        assert torch.equal(dequantize(again), dequantize(q))
        if rule != "ceil":  # ceil may halve a scale and double its codes
            assert same(again, q)


@with_rule
@examples
@given(data=st.data())
def test_a_power_of_two_moves_only_the_scale(name, rule, data):
    x, shift = data.draw(matrices((-50, 0))), data.draw(st.integers(-40, 40))
    q, moved = quantize(x, name, rule=rule), quantize(x * 2.0**shift, name, rule=rule)
    assert torch.equal(moved.codes, q.codes)
    if q.format.scale == "e8m0":
        assert torch.equal(moved.scales.int(), torch.where(q.scales == 0, 0, q.scales.int() + shift))
    elif q.format.tensor_scale:
        assert torch.equal(moved.scales, q.scales)
        assert torch.equal(moved.tensor_scale, q.tensor_scale * 2.0**shift if x.any() else q.tensor_scale)
    else:  # up to 70 columns: one scale for each row, or for all
        zero = (x.view(q.scales.shape[0], -1) == 0).all(1, keepdim=True)
        assert torch.equal(moved.scales, torch.where(zero, 1, q.scales * 2.0**shift))


@by_name
@settings(examples, max_examples=10)
@given(data=st.data())
def test_rows_and_blocks_are_independent(name, data):
    height, width = get_format(name).block
    x = data.draw(matrices((-60, 60)))
    x = x.repeat(-(-3 * height // x.shape[0]), -(-4 * width // x.shape[1]))[: 3 * height, : 4 * width]
    x = x * torch.exp2(torch.arange(x.shape[0]) % 5)[:, None]
    rows = np.array(data.draw(st.permutations(range(3))))[:, None] * height + np.arange(height)
    columns = np.array(data.draw(st.permutations(range(4))))[:, None] * width + np.arange(width)
    rows, columns = torch.from_numpy(rows.flatten()), torch.from_numpy(columns.flatten())
    want = dequantize(quantize(x, name))[rows][:, columns]
    assert torch.equal(dequantize(quantize(x[rows][:, columns], name)), want)


@by_name
def test_an_expert_is_a_view_that_dequantises_alike(name):
    x = torch.randn(4, 130, 70) * torch.exp2(torch.arange(4.0) * 3)[:, None, None]
    q = quantize(x, name)
    whole = dequantize(q)
    for e in (0, 3, -1):
        expert = q[e]
        assert expert.shape == (130, 70)
        assert torch.equal(dequantize(expert), whole[e])
        assert expert.codes.data_ptr() == q.codes[e].data_ptr()
        assert same(expert, quantize(x[e], name))
    assert len(list(q)) == 4
    assert torch.equal(dequantize(quantize(x[None], name)[0][2]), whole[2])


@by_name
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_rows_dequantise_alike(name, lead):
    x = torch.randn(*lead, 300, 40)
    options = {"row_ranges": [100, 1, 199]} if name == "nvfp4" else {}
    for q in (quantize(x, name), quantize(x, name, **options)):
        whole = dequantize(q)
        ranges = [(0, 300), (0, 128), (128, 256), (256, 300), (128, 300), (128, 128)]
        for a, b in ranges + ([(1, 2), (7, 131), (299, 300)] if q.format.block[0] == 1 else []):
            part = q.rows(a, b)
            assert part.shape == (*lead, b - a, 40)
            assert torch.equal(dequantize(part), whole[..., a:b, :])


def test_nbytes_device_and_to():
    q = quantize(torch.randn(2, 3, 40), "nvfp4")
    assert q.nbytes == 2 * 3 * (20 + 3) + 2 * 4
    assert quantize(torch.randn(130, 40), "fp8_block128").nbytes == 130 * 40 + 2 * 4
    assert q.device == torch.device("cpu")
    moved = q.to("meta")
    assert {moved.device.type, moved.scales.device.type, moved.tensor_scale.device.type} == {"meta"}


def test_tensor_scale_by_default_is_each_experts():
    x = torch.randn(3, 5, 40) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    q = quantize(x, "nvfp4")
    assert torch.equal(q.tensor_scale, x.abs().amax((1, 2))[:, None] / 2688)
    assert quantize(x[0], "nvfp4").tensor_scale.tolist() == q.tensor_scale[0].tolist()
    assert torch.equal(quantize(x[0, 0], "nvfp4").tensor_scale, x[0, 0].abs().max() / 2688)


def test_tensor_scale_by_row_range_is_that_of_the_parts():
    x = torch.cat([torch.randn(n, 40) * s for n, s in ((4, 1.0), (2, 50.0), (3, 1e-4))])
    q = quantize(x, "nvfp4", row_ranges=[4, 2, 3])
    parts = [quantize(p, "nvfp4") for p in x.split([4, 2, 3])]
    assert torch.equal(q.tensor_scale, torch.cat([p.tensor_scale.expand(p.shape[0]) for p in parts]))
    assert torch.equal(q.codes, torch.cat([p.codes for p in parts]))
    assert torch.equal(q.scales, torch.cat([p.scales for p in parts]))
    experts = quantize(torch.stack([x, x * 2]), "nvfp4", row_ranges=[4, 2, 3])
    assert torch.equal(experts.tensor_scale, torch.stack([q.tensor_scale, q.tensor_scale * 2]))


@pytest.mark.parametrize("shape", [None, (), (6,), (1, 6), (2, 1), (2, 6)], ids=str)
def test_tensor_scale_given(shape):
    x = torch.randn(2, 6, 40)
    given = 0.01 if shape is None else torch.rand(shape) + 0.1
    q = quantize(x, "nvfp4", tensor_scale=given)
    outer = torch.as_tensor(given).float().expand(2, 6)
    assert torch.equal(q.tensor_scale.expand(2, 6), outer)
    for e in range(2):
        for n in range(6):
            assert torch.equal(q.codes[e, n], quantize(x[e, n], "nvfp4", tensor_scale=outer[e, n]).codes)


@pytest.mark.parametrize("shape", [(3, 5, 40), (5, 40), (40,)], ids=str)
def test_tensor_scale_of_zeros_is_one(shape):
    q = quantize(torch.zeros(shape), "nvfp4")
    assert (q.tensor_scale == 1).all()
    assert (q.scales == 1).all()
    assert not q.codes.any()


X = torch.ones(2, 64)
NVFP4, BLOCK = quantize(X, "nvfp4"), quantize(torch.ones(300, 40), "fp8_block128")


def build(
    name="mxfp4", shape=(2, 64), codes=(2, 32), scales=(2, 2), outer=None, types=(torch.uint8, torch.uint8)
):
    made = [torch.zeros(s, dtype=t) for s, t in zip((codes, scales), types, strict=True)]
    return QuantTensor(get_format(name), shape, *made, outer)


REFUSED = [
    (lambda: quantize(X, "mxfp5"), ["'mxfp5'", "mxfp4"]),
    (lambda: quantize(X, "mxfp4", rule="nearest"), ["'nearest'", "mxfp4", "even, floor, ceil"]),
    (lambda: quantize(X, "mxfp4", rule="amax"), ["'amax'", "mxfp4"]),
    (lambda: quantize(X, "nvfp4", rule="floor"), ["'floor'", "nvfp4", "amax"]),
    (lambda: quantize(X.int(), "mxfp4"), ["torch.int32"]),
    (lambda: quantize(X.to(torch.complex64), "mxfp4"), ["torch.complex64"]),
    (lambda: quantize(torch.zeros(2, 8, dtype=torch.float4_e2m1fn_x2), "mxfp4"), ["float4_e2m1fn_x2"]),
    (lambda: quantize(X.to_sparse(), "nvfp4"), ["sparse_coo", "to_dense"]),
    (lambda: quantize(torch.tensor(1.0), "mxfp4"), ["mxfp4", "()"]),
    (lambda: quantize(torch.ones(40), "fp8_block128"), ["fp8_block128", "(40,)"]),
    (lambda: quantize(X, "mxfp4", tensor_scale=1.0), ["mxfp4", "tensor scale"]),
    (lambda: quantize(X, "fp8_block128", row_ranges=[2]), ["fp8_block128", "tensor scale"]),
    (lambda: quantize(X, "nvfp4", tensor_scale=0.0), ["tensor_scale", "0.0"]),
    (lambda: quantize(X, "nvfp4", tensor_scale=-0.5), ["tensor_scale", "-0.5"]),
    (lambda: quantize(X, "nvfp4", tensor_scale=torch.tensor([1.0, -2.5])), ["tensor_scale", "-2.5"]),
    (lambda: quantize(X, "nvfp4", tensor_scale=math.inf), ["tensor_scale", "inf"]),
    (lambda: quantize(X, "nvfp4", tensor_scale=math.nan), ["tensor_scale", "nan"]),
    (lambda: quantize(X, "nvfp4", tensor_scale=torch.ones(3)), ["tensor_scale", "(3,)", "(2,)"]),
    (lambda: quantize(X[0], "nvfp4", tensor_scale=torch.ones(2)), ["tensor_scale", "(2,)", "()"]),
    (lambda: quantize(X, "nvfp4", tensor_scale=1.0, row_ranges=[2]), ["tensor_scale", "row_ranges"]),
    (lambda: quantize(X, "nvfp4", row_ranges=[1, 2]), ["(1, 2)", "2 rows"]),
    (lambda: quantize(X, "nvfp4", row_ranges=[-1, 3]), ["(-1, 3)", "2 rows"]),
    (lambda: quantize(X[0], "nvfp4", row_ranges=[2]), ["(2,)", "1 rows"]),
    (lambda: build(shape=()), ["mxfp4", "()"]),
    (lambda: build("fp8_block128", (64,)), ["fp8_block128", "(64,)"]),
    (lambda: build(codes=(2, 64)), ["codes", "(2, 32)", "(2, 64)"]),
    (lambda: build(types=(torch.int8, torch.uint8)), ["codes", "torch.uint8", "torch.int8"]),
    (lambda: build(scales=(2, 1)), ["scales", "(2, 2)", "(2, 1)"]),
    (lambda: build(types=(torch.uint8, torch.float32)), ["scales", "torch.uint8", "torch.float32"]),
    (lambda: build("fp8_block128", codes=(2, 64), scales=(1, 1)), ["torch.float32", "torch.uint8"]),
    (lambda: build(outer=torch.ones(())), ["mxfp4", "no tensor_scale"]),
    (lambda: build("nvfp4", scales=(2, 4)), ["nvfp4", "needs tensor_scale"]),
    (lambda: build("nvfp4", scales=(2, 4), outer=torch.ones((), dtype=torch.float64)), ["torch.float64"]),
    (lambda: build("nvfp4", scales=(2, 4), outer=torch.ones(3)), ["(3,)", "(2,)"]),
    (lambda: replace(NVFP4, scales=NVFP4.scales.to("meta")), ["scales", "meta", "cpu"]),
    (lambda: replace(NVFP4, tensor_scale=NVFP4.tensor_scale.to("meta")), ["tensor_scale", "meta", "cpu"]),
    (lambda: BLOCK.rows(0, 100), ["0:100", "128", "fp8_block128"]),
    (lambda: BLOCK.rows(64, 128), ["64:128", "128"]),
    (lambda: BLOCK.rows(0, 384), ["300", "384"]),
    (lambda: NVFP4.rows(0, 3), ["2", "3"]),
    (lambda: NVFP4.rows(2, 1), ["2:1"]),
    (lambda: NVFP4.rows(-1, 2), ["-1:2"]),
    (lambda: quantize(X[0], "mxfp4").rows(0, 1), ["(64,)"]),
    (lambda: NVFP4[0], ["(2, 64)"]),
]


@pytest.mark.parametrize("call, named", REFUSED, ids=["-".join(named) for _, named in REFUSED])
def test_refused_by_name(call, named):
    with pytest.raises(FormatError) as error:
        call()
    assert all(text in str(error.value) for text in named), str(error.value)


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        return func(*args, **(kwargs or {}))


@by_name
@pytest.mark.parametrize("shape", [(2880, 2880), (64, 300, 64)], ids=str)
def test_no_python_loop_over_rows(name, shape):
    x = torch.randn(shape)
    with CountOps() as quantizing:
        q = quantize(x, name)
    with CountOps() as dequantizing:
        dequantize(q, torch.bfloat16)
    # Some 100 for each of 32 chunks, 60 for each of 64 experts; a loop over rows takes ten times as many.
    assert 0 < quantizing.ops < 4500
    assert 0 < dequantizing.ops < 3000
