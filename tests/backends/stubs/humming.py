"""humming-kernels 0.1.19 (PyPI wheel, cp310-abi3-manylinux_2_28_x86_64), the part for 16-bit activations.

Signatures: transform.py (prepare_and_transform_humming_tensors), forward.py (humming_forward), schema/humming.py,
tune/__init__.py (get_heuristics_config).
Checks: csrc/launcher/tensor.h (check_tensor_*), schema/base.py (validate_tensors). Layout: process.cuh in
include/humming/kernel (weight_repack_nk, humming_pack_weight) step by step, transform_humming_weight_scale. The kernels
read what the package packed, so the stub remembers what it packed and refuses anything else.

It also refuses three things that the kernels do and the adapter must not let happen: they add biases after rounding
(arith/epilogue_arith.cuh), partial sums of stream-K in bf16 (epilogue/gmem_writer.cuh), and round float32 block scales
to bf16 (arith/mainloop_arith.cuh).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from microscale.elements import decode, unpack_codes
from microscale.formats import E2M1, E2M3, E3M2, E4M3, E5M2, Element
from microscale.scales import e8m0_value

from . import check, install

ELEMENTS: dict[str, Element] = {
    "float4e2m1": E2M1,
    "float6e2m3": E2M3,
    "float6e3m2": E3M2,
    "float8e4m3": E4M3,
    "float8e5m2": E5M2,
}
SCALES = {"float8e8m0": torch.float8_e8m0fnu, "float8e4m3": torch.float8_e4m3fn}
PADDED_BITS = {4: 4, 6: 8, 8: 8}


@dataclasses.dataclass(kw_only=True)
class HummingWeightSchema:
    b_dtype: str
    bs_dtype: str | None = None
    weight_scale_group_size: int = 0
    weight_scale_group_size_n: int = 0
    weight_scale_type: str | None = None
    weight_scale_2_type: str | None = None
    has_zero_point: bool = False
    is_fp_zero_point: bool = False
    hadamard_block_size: int = 0


@dataclasses.dataclass(kw_only=True, frozen=True)
class LayerConfig:
    shape_n: int
    shape_k: int
    pad_shape_n: int
    pad_shape_k: int
    num_experts: int
    schema: Any
    has_bias: bool
    use_native_dequant: bool


class Package:
    """The modules' functions, and the weights they made. `native`: as on sm_100, where codes are not interleaved."""

    def __init__(self, native: bool = False) -> None:
        self.native = native
        self.made: dict[bytes, Tensor] = {}  # packed bytes -> weights [E, N, K] without the outer scale

    def prepare_and_transform_humming_tensors(
        self,
        tensors: dict[str, Tensor],
        shape_n: int,
        shape_k: int,
        weight_schema: HummingWeightSchema,
        input_schema: Any = None,
        num_experts: int | None = None,
        pad_n_to_multiple: int = 1,
        pad_k_to_multiple: int = 1,
        has_bias: bool = False,
        torch_dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> tuple[LayerConfig, dict[str, Tensor]]:
        schema, element = weight_schema, ELEMENTS[weight_schema.b_dtype]
        check(torch_dtype == torch.bfloat16, f"torch_dtype {torch_dtype}")
        check(device is not None, "no device: the current one is not always the weights'")
        lead = (num_experts,) if num_experts else ()
        width = schema.weight_scale_group_size
        check(schema.weight_scale_group_size_n == 0, "float32 block scales are rounded to bf16")
        check(not has_bias, "biases are added after rounding")
        weight, scale = tensors["weight"], tensors["weight_scale"]
        check(weight.dtype == torch.int32, f"weight.dtype {weight.dtype}")
        _shape("weight", weight, (*lead, shape_n, shape_k * element.bits // 32))
        dtype = SCALES[str(schema.bs_dtype)]
        check(scale.dtype == dtype, f"weight_scale.dtype {scale.dtype}, not {dtype}")
        _shape("weight_scale", scale, (*lead, shape_n, shape_k // width))
        check(("weight_scale_2" in tensors) == (schema.weight_scale_2_type == "tensor"), "weight_scale_2")
        n, k = (math.ceil(s / m) * m for s, m in ((shape_n, pad_n_to_multiple), (shape_k, pad_k_to_multiple)))
        check(n % 64 == 0 and k % 32 == 0, f"padded shape {n} x {k}")
        config = LayerConfig(
            shape_n=n,
            shape_k=k,
            pad_shape_n=n - shape_n,
            pad_shape_k=k - shape_k,
            num_experts=num_experts or 0,
            schema=schema,
            has_bias=has_bias,
            use_native_dequant=self.native,
        )
        raw = weight.view(torch.uint8).reshape(-1, shape_n, weight.shape[-1] * 4)
        codes = unpack_codes(raw, element.bits, shape_k).numpy()
        codes = np.pad(codes, ((0, 0), (0, n - shape_n), (0, k - shape_k)))
        packed = torch.stack([torch.from_numpy(repack(c, element.bits, self.native)) for c in codes])
        values = decode(raw, element, shape_k, torch.float64)
        s = scale.reshape(-1, *scale.shape[-2:])
        numbers = (e8m0_value(s.view(torch.uint8)) if dtype == torch.float8_e8m0fnu else s.float()).double()
        whole = numbers.repeat_interleave(width, 2)
        out = {"weight": packed if lead else packed[0]}
        fill = 127 if dtype == torch.float8_e8m0fnu else 0
        pad = (0, k // width - s.shape[2], 0, n - s.shape[1])
        turned = transform_scale(torch.nn.functional.pad(s.view(torch.uint8), pad, value=fill))
        out["weight_scale"] = turned.view(scale.dtype).reshape(*lead, *turned.shape[1:])
        if schema.weight_scale_2_type == "tensor":
            two = tensors["weight_scale_2"]
            check(two.dtype == torch.float32, f"weight_scale_2.dtype {two.dtype}")
            _shape("weight_scale_2", two, (num_experts or 1,))
            out["weight_scale_2"] = two
        self.made[_key(out["weight"], out["weight_scale"])] = values * whole
        return config, out

    def humming_forward(
        self,
        config: LayerConfig,
        inputs: Tensor,
        weight: Tensor,
        weight_scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        weight_scale_2: Tensor | None = None,
        outputs: Tensor | None = None,
        input_scale: Tensor | None = None,
        input_scale_2: Tensor | None = None,
        sorted_ids: Tensor | None = None,
        expert_ids: Tensor | None = None,
        num_tokens_padded: Tensor | None = None,
        expert_layout: Tensor | None = None,
        locks: Tensor | None = None,
        top_k: int = 1,
        valid_shape_m: int = 0,
        compute_config: dict[str, Any] | str | None = None,
        tuning_config: Any = None,
        hadamard_block_size: int | None = None,
        use_pdl: bool | None = None,
    ) -> Tensor:
        compute = (
            json.loads(compute_config) if isinstance(compute_config, str) else dict(compute_config or {})
        )
        known = {"use_f16_accum", "use_batch_invariant", "use_m_major_input_scale", "gemm_type"}
        check(set(compute) <= known, f"compute_config {compute}")
        check(
            compute.get("use_batch_invariant") is True, "stream-K kernels need locks, and round partial sums"
        )
        check(
            tuning_config == _tuning(inputs.shape[0], compute["gemm_type"]), f"tuning_config {tuning_config}"
        )
        n, k = config.shape_n - config.pad_shape_n, config.shape_k - config.pad_shape_k
        check(inputs.dtype == torch.bfloat16 and inputs.is_contiguous(), f"a: {inputs.dtype}")
        _shape("a", inputs, (inputs.shape[0], k))
        check(weight_scale is not None, "weight_scale is required")
        assert weight_scale is not None
        values = self.made[_key(weight, weight_scale)]
        check(bias is None, "biases are added after rounding")
        if config.schema.weight_scale_2_type == "tensor":
            assert weight_scale_2 is not None
            values = values * weight_scale_2.double()[:, None, None]
        else:
            check(weight_scale_2 is None, "bs2 is not used")
        if config.num_experts == 0:
            check(
                compute["gemm_type"] == "dense" and expert_layout is None, "a single matrix is a dense GEMM"
            )
            edges = [0, inputs.shape[0]]
        else:
            check(compute["gemm_type"] == "grouped_contiguous", f"gemm_type {compute.get('gemm_type')}")
            assert expert_layout is not None
            check(
                expert_layout.dtype in (torch.int32, torch.int64),
                f"expert_layout.dtype {expert_layout.dtype}",
            )
            _shape("expert_token_offset", expert_layout, (config.num_experts + 1,))
            edges = expert_layout.tolist()
        y = torch.full((inputs.shape[0], n), float("nan"), dtype=torch.float64)
        for e, (a, b) in enumerate(itertools.pairwise(edges)):
            y[a:b] = inputs[a:b].double() @ values[e].T
        return y.to(torch.bfloat16)


def get_heuristics_config(
    layer_config: LayerConfig,
    shape_m: int | None = None,
    use_f16_accum: bool = False,
    use_batch_invariant: bool = False,
    use_m_major_input_scale: bool = False,
    gemm_type: str | None = "dense",
    device: Any = None,
) -> Any:
    check(shape_m is not None and shape_m > 0, f"shape_m {shape_m}")
    check(use_batch_invariant, "the settings of stream-K")
    assert shape_m is not None
    return _tuning(shape_m, str(gemm_type))


def _tuning(rows: int, gemm_type: str) -> dict[str, Any]:
    return {"rows": rows, "gemm_type": gemm_type}


def repack(codes: np.ndarray, bits: int, native: bool) -> np.ndarray:
    """weight_repack_nk for 16-bit activations: [N, K] codes -> int32 [K / 16, N * bits / 2]."""
    n, k = codes.shape
    rows, columns, places = [], [], []
    for t in range(32):
        for i in range(8):
            for j in range(8):
                for low in range(2):
                    rows.append(i * 8 + t // 4)
                    columns.append(j * 8 + t % 4 * 2 + low)
                    i1, i3, i4, i5 = j // 2, i * 8 % 64 // 16, i % 2, j % 2
                    places.append((t, ((i1 * 4 + i3) * 2 + i4) * 4 + i5 * 2 + low))
    tiles = np.pad(codes, ((0, 0), (0, -k % 64))).reshape(n // 64, 64, -1, 64).transpose(0, 2, 1, 3)
    tmp = np.zeros((*tiles.shape[:2], 32, 128), dtype=np.uint32)
    where = np.array(places)
    tmp[:, :, where[:, 0], where[:, 1]] = tiles[:, :, rows, columns]
    words = pack_words(tmp, bits, native)  # [N / 64, K / 64, 32, 4 * bits]
    out = np.zeros((-(-k // 64) * 4, n * bits // 2), dtype=np.uint32)
    for bx in range(words.shape[0]):
        for by in range(words.shape[1]):
            for i in range(4):
                for t in range(32):
                    column = 16 * 64 * bx * bits // 32 + t * bits
                    out[by * 4 + i, column : column + bits] = words[bx, by, t, i * bits : (i + 1) * bits]
    return out[: k // 16].view(np.int32)


def pack_words(values: np.ndarray, bits: int, native: bool) -> np.ndarray:
    """humming_pack_weight<bits, 16, native> with interleave_mode 3: [..., 128] -> [..., 4 * bits]."""
    padded = PADDED_BITS[bits]
    lanes = 32 // padded
    half = lanes // 2
    out = np.zeros((*values.shape[:-1], 4 * padded), dtype=np.uint32)
    for i in range(4):
        for j in range(padded):
            for k in range(lanes):
                source = k if native else k % half * 2 + k // half
                out[..., i * padded + j] |= values[..., i * 32 + j * lanes + source] << np.uint32(k * padded)
    if bits != 6:
        return out
    six = np.zeros((*values.shape[:-1], 24), dtype=np.uint32)
    for i in range(4):
        for half_of in range(2):
            o = [out[..., 8 * i + 4 * half_of + w] for w in range(4)]
            at = 6 * i + 3 * half_of
            six[..., at] = (o[0] & 0x3F3F3F3F) | ((o[1] & 0x30303030) << 2)
            six[..., at + 1] = (o[1] & 0x0F0F0F0F) | ((o[2] & 0x3C3C3C3C) << 2)
            six[..., at + 2] = (o[2] & 0x03030303) | ((o[3] & 0x3F3F3F3F) << 2)
    return six


def transform_scale(t: Tensor) -> Tensor:
    """transform_humming_weight_scale of group scales, neither blockwise nor for block-scaled instructions."""
    perm = [x + i for i in range(8) for x in (0, 8, 16, 24, 32, 40, 48, 56)]
    t = t.transpose(-1, -2).contiguous()
    return t.view(-1, len(perm))[:, perm].contiguous().view(t.shape)


def _shape(what: str, t: Tensor, shape: tuple[int, ...]) -> None:
    check(tuple(t.shape) == shape, f"{what}.shape {tuple(t.shape)}, not {shape}")
    check(t.is_contiguous(), f"{what} must be contiguous")


def _key(weight: Tensor, scale: Tensor) -> bytes:
    return weight.numpy().tobytes() + scale.view(torch.uint8).numpy().tobytes()


def stub(monkeypatch: pytest.MonkeyPatch, native: bool = False) -> Package:
    package = Package(native)
    install(monkeypatch, "humming")
    install(monkeypatch, "humming.schema", HummingWeightSchema=HummingWeightSchema)
    made = {
        "prepare_and_transform_humming_tensors": package.prepare_and_transform_humming_tensors,
    }
    install(monkeypatch, "humming.transform", **made)
    install(monkeypatch, "humming.forward", humming_forward=package.humming_forward)
    install(monkeypatch, "humming.tune", get_heuristics_config=get_heuristics_config)
    return package
