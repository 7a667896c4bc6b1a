"""Hopper's own kernels of the triton backend, without a GPU: their layout, and that every cut of the tables compiles.

MICROSCALE_TEST_EVERY_CUT=1 compiles each cut in every combination of options, which takes minutes.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from triton_ahead import compiled, random_bytes

from microscale.quant import dequantize


@pytest.fixture
def layout() -> Any:
    pytest.importorskip("triton", reason="triton is not installed")
    from microscale.backends.triton import layout

    return layout


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(1, 32), (65, 96), (130, 160), (2, 64, 64), (3, 200, 352)])
def test_unpack_is_the_exact_inverse_of_fragments(layout: Any, name: str, shape: tuple[int, ...]) -> None:
    fragments = import_module("microscale.backends.triton.fragments")
    w = random_bytes(name, shape)
    assert not fragments.suits(replace(w, scales=w.scales | 0xFF))
    w.scales.clamp_(max=128 if name == "mxfp4" else 126)
    assert fragments.suits(w)
    packed = fragments.pack(w)
    with pytest.warns(UserWarning, match="kept a second time"):
        plain = packed.plain
    for back in (fragments.unpack(packed), layout.unpack(plain)):
        assert (back.format, back.shape, back.rule) == (w.format, w.shape, w.rule)
        assert torch.equal(back.codes, w.codes)
        assert torch.equal(back.scales, w.scales)
        assert (back.tensor_scale is None) == (w.tensor_scale is None)


def test_fragments_are_for_bytes_that_the_layout_can_hold(layout: Any) -> None:
    fragments = import_module("microscale.backends.triton.fragments")
    assert not fragments.suits(random_bytes("mxfp8_e4m3", (64, 64)))
    w = random_bytes("mxfp4", (64, 48))
    w.scales.fill_(120)
    assert not fragments.suits(w)


def test_the_hopper_kernels_decode_what_fragments_holds(layout: Any) -> None:
    """The kernel's shifts and masks, bit for bit, on integers: every code comes out where wgmma wants it."""
    fragments = import_module("microscale.backends.triton.fragments")
    w = random_bytes("mxfp4", (128, 128))
    w.scales.fill_(127)
    words = fragments.pack(w).codes.view(2, 2, 4, 8, 4, 2, 2).long() & 0xFFFFFFFF

    def rotated(v: torch.Tensor, left: int) -> torch.Tensor:
        return (v << left | v >> 32 - left) & 0xFFFFFFFF

    zero, one = words.unbind(-1)
    rest = zero & 0x0C180C18 | one << 2 & 0xFFFFFFFF & ~0x0C180C18
    pairs = [
        zero,
        zero << 6,
        rotated(zero, 10),
        one,
        one << 6,
        rotated(one, 10),
        rest << 2,
        rotated(rest, 12),
    ]
    bits = torch.stack(pairs, -1) & 0x81C081C0
    halves = torch.stack((bits << 16, bits & 0xFFFF0000), -1) & 0xFFFFFFFF
    found = (halves - (halves >> 31 << 32)).int().view(torch.float32).double() * 2.0**126
    # tile, chunk, warp, g, t, p, (q, h, odd row), odd column -> rows, columns
    found = found.unflatten(-2, (2, 2, 2)).permute(0, 2, 3, 8, 1, 5, 6, 7, 4, 9).reshape(128, 128)
    assert torch.equal(found, dequantize(w, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_wider_activations_are_sums_of_bfloat16(layout: Any, dtype: torch.dtype) -> None:
    as_parts = import_module("microscale.backends.triton.hopper").as_parts
    info = torch.finfo(dtype)
    special = [
        0.0,
        -0.0,
        info.max,
        -info.max,
        info.smallest_normal,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
    x = torch.cat((torch.randn(2000).to(dtype), torch.tensor(special, dtype=dtype)))[None]
    parts = as_parts(x)
    assert parts.shape == (1, 2 if dtype == torch.float16 else 3, x.shape[1])
    assert parts.dtype == torch.bfloat16
    usual = x.isfinite() & (x.abs() >= 2.0**-100)
    assert torch.equal(parts.double().sum(1)[usual], x.double()[usual])
    # Not inf - inf, and no NaN that became an infinity.
    assert torch.equal(parts[:, 0].isnan(), x.isnan())
    assert torch.equal(parts[:, 0].isinf(), x.isinf())
    assert (parts[:, 1:][~usual.expand(parts.shape[1] - 1, -1)[None]].abs() < 2.0**-100).all()


def test_every_number_of_tokens_has_a_cut_that_fits(layout: Any) -> None:
    tiles = import_module("microscale.backends.triton.tiles")

    def check(cut: Any, parts: int) -> None:
        # A step's codes, NVFP4's scales and the tokens.
        step = cut.chunks * (cut.tiles * (2048 + 256) + 128 * parts * cut.block_m)
        assert cut.stages * step <= 227 << 10
        assert cut.stages >= 3
        assert cut.warps == 4 or cut.tiles >= 2
        assert parts == 1 or cut.chunks == 1

    for tokens in (1, 2, 8, 9, 31, 64, 127, 300, 2048, 20000):
        for parts in (1, 2, 3):
            check(tiles.linear_cut(fmt, tokens, 5120, parts), parts)
            for experts, top_k in ((8, 2), (32, 4), (128, 8)):
                for rows in (768, 5760):
                    first, second = tiles.moe_cuts((fmt, fmt), tokens, top_k, experts, rows, parts)
                    assert (first.block_m, first.tail) == (second.block_m, second.tail)
                    assert first.tiles >= 2  # gates and ups that lie apart
                    assert not first.tail or first.block_m >= 16
                    assert tokens > 1 or first.block_m == 8  # routes that are tiles of their own
                    check(first, parts)
                    check(second, parts)


# w13's activations: kind, gated, interleaved, with a bias.
ACTIVATIONS = (("swiglu_oai", True, True, True), ("silu", True, False, False), ("silu", False, False, True))


def given(
    packed: Any,
    cut: Any,
    activation: tuple[str, bool, bool, bool],
    parts: int,
    direct: bool,
    bias: str | None,
) -> dict[str, Any]:
    """What the three kernels are called with, as the host code does."""
    kind, gated, interleaved, _ = activation
    ids = "*i64" if direct else "*i32"
    return cut.constants(packed) | {
        **dict.fromkeys(("codes", "scales"), "*i32"),
        **dict.fromkeys(("tile_experts", "tile_starts", "ends", "order"), ids),
        **dict.fromkeys(("M", "N", "K", "WIDTH", "TILES", "CHUNKS", "STEPS", "top_k"), "i32"),
        **dict.fromkeys(("experts", "known"), "i32"),
        **dict.fromkeys(("alpha", "beta", "limit"), "fp32"),
        **dict.fromkeys(("x", "x_half", "y", "h", "h_half", "shares"), "*bf16"),
        "bias": bias,
        "HAS_BIAS": bias is not None,
        "topk_weights": "*fp32",
        "expert_map": "*i64" if direct else None,
        "HAS_MAP": direct,
        "DIRECT": direct,
        "TAIL": cut.tail and not direct,
        "PARTS": parts,
        "row_scale": "*fp32" if packed.row_scale is not None else None,
        "GROUP": 8,
        "KIND": kind,
        "GATED": gated,
        "INTERLEAVED": interleaved,
        "HAS_LIMIT": interleaved,
        "WEIGHT_ON_INPUT": False,
        "PDL": True,
    }


def packed_weights(name: str, k: int) -> Any:
    w = random_bytes(name, (2, 128, k))
    w.scales.fill_(120)
    return import_module("microscale.backends.triton.fragments").pack(w)


def modules() -> list[Any]:
    return [import_module(f"microscale.backends.triton.{n}") for n in ("hopper", "hopper_moe", "tiles")]


def for_hopper(kernel: Any, arguments: dict[str, Any], cut: Any) -> Any:
    return compiled(kernel, "sm_90", arguments, {"num_warps": cut.warps}, ("K", "N", "WIDTH"))


@pytest.mark.parametrize(
    "block_m, overlap, parts, direct, tail",
    [(8, False, 1, True, False), (128, True, 1, False, True), (64, True, 3, False, False)],
)
@pytest.mark.parametrize("name, activation", [("mxfp4", ACTIVATIONS[0]), ("nvfp4", ACTIVATIONS[1])])
def test_the_hopper_kernels_keep_weights_in_registers(
    layout: Any, name: str, activation: tuple[str, bool, bool, bool],
    block_m: int, overlap: bool, parts: int, direct: bool, tail: bool,
) -> None:  # fmt: skip
    hopper, experts, tiles = modules()
    cut = tiles.Cut(block_m, 2, 2 if parts == 1 else 1, 8, 4, overlap, tail)
    arguments = given(packed_weights(name, 160), cut, activation, parts, direct, "*bf16")
    for kernel in (hopper._linear_kernel, experts._first_kernel, experts._second_kernel):
        ptx = for_hopper(kernel, arguments, cut).asm["ptx"]
        products = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (\S)", ptx)
        # A brace: the left operand is a list of registers.
        assert set(products) == {"{"}
        if overlap:  # one product waits for the one before it, so that two are under way
            assert f"wgmma.wait_group.sync.aligned {parts};" in re.sub(r"\s+", " ", ptx)


def table_kernels() -> list[tuple[Any, Any, int]]:
    """(kernel, cut, parts of the activations): what the tables can select."""
    hopper, experts, tiles = modules()
    rows = [row for table in tiles.MOE.values() for row in table]
    found = [(hopper._linear_kernel, cut, 1) for table in tiles.LINEAR.values() for _, cut in table]
    found += [(experts._first_kernel, row[3], 1) for row in rows]
    found += [(experts._second_kernel, row[4], 1) for row in rows]
    in_parts = [(tiles._in_parts(tokens), parts) for tokens in (8, 16, 32, 64) for parts in (2, 3)]
    kernels = (experts._first_kernel, experts._second_kernel, hopper._linear_kernel)
    found += [(kernel, *rest) for kernel in kernels for rest in in_parts]
    return list(dict.fromkeys(found))


def test_every_cut_of_the_tables_compiles(layout: Any) -> None:
    """By default each kernel once, with formats, activations, sizes and single tokens taking turns."""
    hopper, experts, _ = modules()
    failed = []
    for i, (kernel, cut, parts) in enumerate(table_kernels()):
        # w2 and linear know of an activation only whether there is a bias.
        activations = ACTIVATIONS if kernel is experts._first_kernel else ACTIVATIONS[:2]
        # A single token has no more than 8 rows, and a linear no routes.
        direct = (False, True) if cut.block_m == 8 and kernel is not hopper._linear_kernel else (False,)
        options = list(product(("mxfp4", "nvfp4"), activations, (192, 512), direct))
        if os.environ.get("MICROSCALE_TEST_EVERY_CUT") != "1":
            options = [options[5 * i % len(options)]]
        for name, activation, k, single in options:
            bias = "*bf16" if activation[3] else None
            arguments = given(packed_weights(name, k), cut, activation, parts, single, bias)
            try:
                assert for_hopper(kernel, arguments, cut).metadata.shared <= 227 << 10
            except (AssertionError, RuntimeError) as error:
                what = ("PARTS", "SCALE", "EVEN", "KIND", "GATED", "HAS_BIAS", "DIRECT")
                failed.append((kernel.__name__, str(cut), {w: arguments[w] for w in what}, str(error)))
    assert not failed


def test_what_does_not_compile_is_left_to_the_kernels_for_every_target(layout: Any) -> None:
    attempt = import_module("microscale.backends.triton.fallback").attempt
    tried = []

    def broken() -> torch.Tensor:
        tried.append(1)
        raise RuntimeError("PassManager::run failed")

    with pytest.warns(UserWarning, match="linear m8t1 .*PassManager::run failed"):
        assert attempt(broken, lambda: torch.ones(1), "linear", "m8t1") == 1
    assert attempt(broken, lambda: torch.ones(1), "linear", "m8t1") == 1
    assert len(tried) == 1

    def lost() -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        attempt(lost, lambda: torch.ones(1), "linear", "m8t2")
