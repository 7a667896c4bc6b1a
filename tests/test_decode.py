"""`dequantize` over every code and every scale: bit-exact in float64, rounded once in every other dtype."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch

import integer_oracle as oracle
from microscale import FORMATS, QuantTensor, dequantize, get_format, quant, quantize
from microscale.formats import MX_RULES

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
by_dtype = pytest.mark.parametrize("dtype", BITS, ids=lambda d: str(d).removeprefix("torch."))
MX = [f for f in FORMATS.values() if f.rules == MX_RULES]
by_mx = pytest.mark.parametrize("fmt", MX, ids=lambda f: f.name)


def beside_midpoint(mantissa_bits: int) -> float:
    """A float32 t; 3t, rounded to float32, is midway between two numbers with that many mantissa bits.

    3t itself lies on the side of the odd one, so that rounding twice gives the wrong number.
    """
    half_step = 1 << 22 - mantissa_bits
    for i in range(1, 2**mantissa_bits, 2):
        beyond = 4 * (2**23 + half_step * i) + (1 if i % 4 == 1 else -1)
        if beyond % 3 == 0:
            return beyond // 3 / 2**24
    raise AssertionError("there is one for 7 and 10 bits")


FLOAT_SCALES = {
    "1": 1.0,
    "2^-20": 2.0**-20,
    "2^40": 2.0**40,
    "third": float(np.float32(1 / 3)),
    "pi": float(np.float32(3.14159265)),
    "tiny": float(np.float32(1.1e-30)),
    "subnormal": 5 * 2.0**-147,
    "huge": float(np.float32(3.1e38)),
    "beside-bf16-midpoint": beside_midpoint(7),
    "beside-f16-midpoint": beside_midpoint(10),
}


def assert_is(found: torch.Tensor, numbers: list[oracle.Number]) -> None:
    """Every value of `found` is its number rounded to the dtype, bit for bit; any NaN for a NaN."""
    name = str(found.dtype).removeprefix("torch.")
    width = found.element_size() * 8
    want = np.array([oracle.float_bits(n, name) for n in numbers], dtype=np.uint64).astype(f"u{width // 8}")
    nan = np.array([n[1] is oracle.NAN for n in numbers])
    bits = found.flatten().view(BITS[found.dtype]).numpy().view(want.dtype)
    np.testing.assert_array_equal(found.flatten().isnan().numpy(), nan)
    np.testing.assert_array_equal(bits[~nan], want[~nan])


def packed(codes: int, rows: int, bits: int) -> torch.Tensor:
    """[rows, bytes]: each row holds the codes 0 .. codes - 1."""
    return torch.frombuffer(bytearray(oracle.pack(range(codes), bits)), dtype=torch.uint8).repeat(rows, 1)


def every_mx(fmt) -> QuantTensor:
    """Row b: every code, times scale byte b."""
    k = 2**fmt.element.bits
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, -(-k // 32))
    return QuantTensor(fmt, (256, k), packed(k, 256, fmt.element.bits), scales)


@cache
def products(element: str) -> list[oracle.Number]:
    """Of every code, for every scale byte in turn."""
    codes = [oracle.decode(element, c) for c in range(1 << oracle.ELEMENTS[element][0])]
    return [oracle.multiply(code, oracle.e8m0(byte)) for byte in range(256) for code in codes]


@by_dtype
@by_mx
def test_mx_every_code_and_scale(fmt, dtype):
    found = dequantize(every_mx(fmt), dtype)
    assert_is(found, products(fmt.element.name))
    assert found[255].isnan().all()


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("mxfp4", ml_dtypes.float4_e2m1fn),
        ("mxfp6_e2m3", ml_dtypes.float6_e2m3fn),
        ("mxfp6_e3m2", ml_dtypes.float6_e3m2fn),
        ("mxfp8_e4m3", ml_dtypes.float8_e4m3fn),
        ("mxfp8_e5m2", ml_dtypes.float8_e5m2),
    ],
    ids=lambda v: v if isinstance(v, str) else "ml_dtypes",
)
def test_mx_against_ml_dtypes(name, dtype):
    q = every_mx(FORMATS[name])
    codes = np.arange(q.shape[1], dtype=np.uint8).view(dtype).astype(np.float64)
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(dequantize(q, torch.float64).numpy(), scales[:, None] * codes)


@pytest.mark.parametrize(
    "name, dtype", [("mxfp8_e4m3", torch.float8_e4m3fn), ("mxfp8_e5m2", torch.float8_e5m2)]
)
def test_mx_against_torch(name, dtype):
    q = every_mx(FORMATS[name])
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).double()
    want = scales[:, None] * q.codes.view(dtype).double()
    torch.testing.assert_close(dequantize(q, torch.float64), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tensor_scale", FLOAT_SCALES.values(), ids=FLOAT_SCALES)
@by_dtype
def test_nvfp4_every_code_and_scale(dtype, tensor_scale):
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    q = QuantTensor(get_format("nvfp4"), (256, 16), packed(16, 256, 4), scales, torch.tensor(tensor_scale))
    outer = oracle.from_float(tensor_scale)
    codes = [oracle.decode("e2m1", c) for c in range(16)]
    want = [oracle.multiply(code, oracle.decode("e4m3", s), outer) for s in range(256) for code in codes]
    assert_is(dequantize(q, dtype), want)


@pytest.mark.parametrize("name", ["fp8_block128", "fp8_group128"])
@by_dtype
def test_block_fp8_every_code(dtype, name):
    values = [*FLOAT_SCALES.values(), float("nan"), float("inf"), 0.0]
    k = 256 * len(values)
    codes = torch.arange(256, dtype=torch.uint8).repeat(1, len(values))
    q = QuantTensor(get_format(name), (1, k), codes, torch.tensor(values).repeat_interleave(2)[None])
    every = [oracle.decode("e4m3", c) for c in range(256)]
    assert_is(dequantize(q, dtype), [oracle.multiply(c, oracle.from_float(v)) for v in values for c in every])


@by_dtype
def test_the_edges_by_hand(dtype):
    # 57344, inf, NaN, -0, 2^-16, 1
    codes = torch.tensor([0x7B, 0x7C, 0x7D, 0x80, 0x01, 0x3C], dtype=torch.uint8).repeat(4, 1)
    scales = torch.tensor([[0], [127], [254], [255]], dtype=torch.uint8)
    found = dequantize(QuantTensor(get_format("mxfp8_e5m2"), (4, 6), codes, scales), dtype)
    assert (found[:3, 1] == float("inf")).all()
    assert found[:3, 2].isnan().all()
    assert torch.equal(found[:3, 3], torch.zeros(3, dtype=dtype))
    assert torch.signbit(found[:3, 3]).all()
    assert found[3].isnan().all()
    # Smallest subnormal of bfloat16 is 2^-133, of float16 2^-24; both overflow where float32 does.
    holds = {torch.float64: -1074, torch.float32: -149, torch.bfloat16: -133, torch.float16: -24}[dtype]
    assert found[0, 4:].tolist() == [2.0**-143 if holds <= -143 else 0.0, 2.0**-127 if holds <= -127 else 0.0]
    assert found[2, 5] == (2.0**127 if dtype != torch.float16 else float("inf"))
    assert found[2, 0] == (57344 * 2.0**127 if dtype == torch.float64 else float("inf"))


def test_block_fp8_scale_of_each_ragged_block():
    # Code 0x38 is 1: each value is its block's scale.
    scales = torch.randn(2, 3, 2)
    codes = torch.full((2, 300, 140), 0x38, dtype=torch.uint8)
    found = dequantize(QuantTensor(get_format("fp8_block128"), (2, 300, 140), codes, scales))
    want = scales.repeat_interleave(128, 1)[:, :300].repeat_interleave(128, 2)[:, :, :140]
    assert torch.equal(found, want)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (1, 7), (3, 7)], ids=str)
def test_nvfp4_tensor_scale_broadcasts(shape):
    outer = torch.rand(shape) + 0.5
    codes = torch.randint(0, 256, (3, 7, 20), dtype=torch.uint8)
    scales = torch.randint(0, 127, (3, 7, 3), dtype=torch.uint8)
    fmt = get_format("nvfp4")
    found = dequantize(QuantTensor(fmt, (3, 7, 40), codes, scales, outer), torch.float64)
    plain = dequantize(QuantTensor(fmt, (3, 7, 40), codes, scales, torch.ones(())), torch.float64)
    assert torch.equal(found, plain * outer.double().expand(3, 7)[..., None])


@pytest.mark.parametrize("name", ["nvfp4", "fp8_block128"])
def test_a_device_without_float64_differs_only_by_rounding_twice(name, monkeypatch):
    q = quantize(torch.randn(130, 140), name)
    once = dequantize(q, torch.bfloat16)
    monkeypatch.setattr(quant, "has_float64", lambda device: False)
    twice = dequantize(q, torch.bfloat16)
    assert torch.equal(twice, dequantize(q).bfloat16())
    torch.testing.assert_close(twice, once, rtol=2**-7, atol=0)


@by_dtype
@pytest.mark.parametrize("name", [*FORMATS, "fp8_group128"])
def test_the_chunk_does_not_show(name, dtype, monkeypatch):
    fmt = get_format(name)
    shape = (2, 260, 70)
    codes = torch.randint(0, 256, (*shape[:2], fmt.packed_columns(70)), dtype=torch.uint8)
    scales = torch.randint(0, 256, (2, *fmt.scale_shape(260, 70)), dtype=torch.uint8)
    if fmt.scale == "f32":
        scales = torch.rand(scales.shape)
    q = QuantTensor(fmt, shape, codes, scales, torch.rand(2, 260) if fmt.tensor_scale else None)
    whole = dequantize(q, dtype)
    for chunk in (1, 1000):
        monkeypatch.setattr(quant, "CHUNK", chunk)
        found = dequantize(q, dtype)
        assert torch.equal(found.isnan(), whole.isnan())
        assert torch.equal(found.nan_to_num(1).view(BITS[dtype]), whole.nan_to_num(1).view(BITS[dtype]))


@by_dtype
@by_mx
def test_where_subnormal_numbers_are_flushed_normal_products_are_still_exact(fmt, dtype):
    q = every_mx(fmt)
    exact = dequantize(q, dtype)
    assert torch.set_flush_denormal(True)
    try:
        found = dequantize(q, dtype)
    finally:
        torch.set_flush_denormal(False)
    kept = (exact.abs() >= torch.finfo(dtype).tiny) & exact.isfinite()
    assert kept[0].any() or dtype == torch.float16, "none of them under the scale that is subnormal itself"
    assert kept.any()
    torch.testing.assert_close(found[kept], exact[kept], rtol=0, atol=0)
