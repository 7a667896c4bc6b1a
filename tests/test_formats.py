"""Elements, scales and the table of formats, against the integer oracle, ml_dtypes and torch's own types."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import integer_oracle as oracle
from microscale import FORMATS, FormatError, get_format, quantize
from microscale.elements import decode_table, encode
from microscale.formats import E2M1, E2M3, E3M2, E4M3, E5M2, FP8_GROUP128, INT8, MX_RULES, activation_format
from microscale.scales import e8m0_from_amax, scale_value

ELEMENTS = [E2M1, E2M3, E3M2, E4M3, E5M2, INT8]
by_element = pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)

ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
TORCH_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in value and sign of zero; NaN equals NaN."""
    numbers = ~np.isnan(a)
    return np.array_equal(a, b, equal_nan=True) and np.array_equal(
        np.signbit(a)[numbers], np.signbit(b)[numbers]
    )


@by_element
def test_every_code_is_the_oracles_number(element):
    assert len(element.values) == 2**element.bits
    for code, value in enumerate(element.values):
        sign, magnitude = oracle.decode(element.name, code)
        if magnitude is oracle.NAN:
            assert math.isnan(value), hex(code)
        else:
            assert oracle.from_float(value) == (sign, magnitude), hex(code)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_is_ml_dtypes_number(name):
    element = next(e for e in ELEMENTS if e.name == name)
    codes = np.arange(2**element.bits, dtype=np.uint8)
    assert same(np.array(element.values), codes.view(ML_DTYPES[name]).astype(np.float64))


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_every_code_is_torchs_number(name):
    codes = torch.arange(256, dtype=torch.uint8)
    table = decode_table(E4M3 if name == "e4m3" else E5M2, torch.float32, torch.device("cpu"))
    assert same(table[:, 0].numpy(), codes.view(TORCH_DTYPES[name]).float().numpy())


@by_element
def test_encode_returns_each_code_to_itself(element):
    for code in range(2**element.bits):
        if not math.isfinite(element.values[code]) or (element is INT8 and code == 0x80):
            continue
        assert encode(torch.tensor([element.values[code]]), element).item() == code, hex(code)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_encode_rounds_as_ml_dtypes(name):
    element = next(e for e in ELEMENTS if e.name == name)
    x = (torch.randn(20000) * torch.exp2(torch.randint(-20, 16, (20000,)))).clamp(-element.max, element.max)
    want = x.numpy().astype(ML_DTYPES[name]).view(np.uint8)
    np.testing.assert_array_equal(encode(x, element).numpy(), want)


@by_element
def test_encode_saturates_beyond_max(element):
    x = torch.tensor([element.max, math.nextafter(element.max, math.inf), element.max * 1.5, 3e38, math.inf])
    values = torch.tensor(element.values)
    assert (values[encode(x, element).long()] == element.max).all()
    assert (values[encode(-x, element).long()] == -element.max).all()


def test_e8m0_every_byte():
    every = torch.arange(256, dtype=torch.uint8)
    found = scale_value(every, FORMATS["mxfp4"], torch.float32)
    assert found.isnan().nonzero().flatten().tolist() == [255]
    assert [oracle.from_float(v) for v in found.tolist()[:255]] == [oracle.e8m0(b) for b in range(255)]
    assert same(found.numpy(), every.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert same(found.numpy(), every.view(torch.float8_e8m0fnu).float().numpy())


def test_e4m3_scale_every_byte():
    every = torch.arange(256, dtype=torch.uint8)
    found = scale_value(every, FORMATS["nvfp4"], torch.float32)
    assert same(found.numpy(), every.view(torch.float8_e4m3fn).float().numpy())


@pytest.mark.parametrize("rule", MX_RULES)
@by_element
def test_e8m0_rule_at_its_edges(element, rule):
    mantissas = {1.0, 1.5, 1.75, 2 - 2.0**-23, element.max / 2.0**element.emax}
    mantissas |= {2 - 2.0 ** (-element.mantissa_bits - i) for i in range(3)}
    exact = np.array([m * 2.0**e for m in mantissas for e in range(-149, 128)])
    at = exact.astype(np.float32)
    random = torch.randint(0, 0x7F800000, (3000,), dtype=torch.int32).view(torch.float32).numpy()
    with np.errstate(over="ignore"):
        beside = [np.nextafter(at, np.float32(to)) for to in (0, math.inf)]
    amax = np.concatenate([at, *beside, random, np.float32([0])])
    amax = amax[np.isfinite(amax)]
    want = [oracle.e8m0_byte(rule, Fraction(float(a)), element.name) for a in amax]
    found = e8m0_from_amax(torch.from_numpy(amax), element, rule).tolist()
    wrong = [(a, f, w) for a, f, w in zip(amax.tolist(), found, want, strict=True) if f != w]
    assert not wrong, f"amax, found, wanted: {wrong[:5]}"


class Divisions(TorchDispatchMode):
    """The divisors of all divisions."""

    def __init__(self) -> None:
        super().__init__()
        self.divisors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.divisors.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["nvfp4", "fp8_block128", "fp8_group128"])
def test_divides_by_tensors_only(name):
    # torch multiplies by the reciprocal of a Python number on CUDA and XPU: scales would differ by device.
    with Divisions() as seen:
        quantize(torch.randn(3, 40), name)
    assert seen.divisors
    assert all(isinstance(d, torch.Tensor) for d in seen.divisors)


@pytest.mark.parametrize(
    "element, largest, emax, emin",
    [(E2M1, 6, 2, 0), (E2M3, 7.5, 2, 0), (E3M2, 28, 4, -2), (E4M3, 448, 8, -6), (E5M2, 57344, 15, -14)],
    ids=lambda v: getattr(v, "name", None),
)
def test_element_limits(element, largest, emax, emin):
    assert (element.max, element.emax, element.emin) == (largest, emax, emin)
    fraction, exponent = element.max_parts
    assert Fraction(2**23 + fraction, 2**23) * 2**exponent == Fraction(largest)
    assert Fraction(largest) == oracle.magnitudes(element.name)[-1]


def test_int8_limits():
    assert (INT8.max, INT8.emax, INT8.max_parts) == (127 / 64, 0, (63 << 17, 0))
    assert (INT8.values[0x80], INT8.values[0x81]) == (-2.0, -127 / 64)


@pytest.mark.parametrize(
    "name, block, scale, bits_per_weight, columns_of_33, scales_of_130_by_33",
    [
        ("mxfp4", (1, 32), "e8m0", 4.25, 17, (130, 2)),
        ("mxfp6_e2m3", (1, 32), "e8m0", 6.25, 25, (130, 2)),
        ("mxfp6_e3m2", (1, 32), "e8m0", 6.25, 25, (130, 2)),
        ("mxfp8_e4m3", (1, 32), "e8m0", 8.25, 33, (130, 2)),
        ("mxfp8_e5m2", (1, 32), "e8m0", 8.25, 33, (130, 2)),
        ("mxint8", (1, 32), "e8m0", 8.25, 33, (130, 2)),
        ("nvfp4", (1, 16), "e4m3", 4.5, 17, (130, 3)),
        ("fp8_block128", (128, 128), "f32", 8 + 32 / 16384, 33, (2, 1)),
        ("fp8_group128", (1, 128), "f32", 8.25, 33, (130, 1)),
    ],
)
def test_format_record(name, block, scale, bits_per_weight, columns_of_33, scales_of_130_by_33):
    fmt = get_format(name)
    assert (fmt.name, fmt.block, fmt.scale, fmt.bits_per_weight) == (name, block, scale, bits_per_weight)
    assert fmt.tensor_scale == (name == "nvfp4")
    assert fmt.packed_columns(33) == columns_of_33
    assert fmt.scale_shape(130, 33) == scales_of_130_by_33
    assert fmt.packed_columns(0) == 0
    assert fmt.scale_shape(0, 0) == (0, 0)
    assert get_format(fmt) is fmt


def test_the_table_is_complete_and_read_only():
    names = "mxfp4 mxfp6_e2m3 mxfp6_e3m2 mxfp8_e4m3 mxfp8_e5m2 mxint8 nvfp4 fp8_block128"
    assert " ".join(FORMATS) == names
    with pytest.raises(TypeError):
        FORMATS["mxfp4"] = FORMATS["nvfp4"]
    with pytest.raises(AttributeError):
        FORMATS["mxfp4"].block = (1, 16)


@pytest.mark.parametrize("name", ["mxfp5", "MXFP4", "", "fp8_block"])
def test_unknown_format_is_named_and_the_known_are_listed(name):
    with pytest.raises(FormatError) as error:
        get_format(name)
    assert repr(name) in str(error.value)
    assert all(known in str(error.value) for known in (*FORMATS, FP8_GROUP128.name))


@pytest.mark.parametrize(
    "weight, act, want",
    [
        ("mxfp4", "a16", None),
        ("mxfp4", "a8", "mxfp8_e4m3"),
        ("mxfp4", "a6", "mxfp6_e2m3"),
        ("mxfp4", "a4", "mxfp4"),
        ("mxfp6_e3m2", "a6", "mxfp6_e3m2"),
        ("mxfp8_e5m2", "a8", "mxfp8_e5m2"),
        ("nvfp4", "a4", "nvfp4"),
        ("nvfp4", "a8", "mxfp8_e4m3"),
        ("fp8_block128", "a8", "fp8_group128"),
        ("mxfp4", "mxint8", "mxint8"),
    ],
)
def test_activation_format(weight, act, want):
    found = activation_format(weight, act)
    assert (found and found.name) == want


@pytest.mark.parametrize("act, named", [("a5", "'a5'"), ("fp8_block128", "128 rows")])
def test_activation_format_refuses(act, named):
    with pytest.raises(FormatError, match=named):
        activation_format("mxfp4", act)


def test_decode_table_made_in_inference_mode_meets_autograd():
    decode_table.cache_clear()
    with torch.inference_mode():
        decode_table(E2M1, torch.float32, torch.device("cpu"))
    x = torch.ones(256, 2, requires_grad=True)
    (x * decode_table(E2M1, torch.float32, torch.device("cpu"))).sum().backward()
