"""Hopper's own kernels of the triton backend, without a GPU: their layout, and that every cut of the tables compiles.

MICROSCALE_TEST_EVERY_CUT=1 compiles each cut in every combination of options, which takes minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import replace
from importlib import import_module
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_ahead import TARGETS, Made, all_of, compiled, made, random_bytes

from microscale.formats import FORMATS
from microscale.quant import dequantize


def suitable_bytes(name: str, shape: tuple[int, ...]) -> Any:
    """Random bytes that Hopper's layout can hold: no infinities or NaNs, and scales in its range."""
    layout = import_module("microscale.backends.triton.layout")
    w = random_bytes(name, shape)
    element = w.format.element
    special = [c for c, v in enumerate(element.values) if abs(v) == float("inf") or v != v]
    if special:
        w.codes[torch.isin(w.codes, torch.tensor(special, dtype=torch.uint8))] = 1
    if w.format.scale == "e8m0":
        least, greatest = layout.exponent_range(element, torch.bfloat16)
        w.scales.clamp_(min=least, max=greatest)
    elif w.format.scale == "e4m3":
        w.scales.clamp_(max=126)
    return w


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (65, 96), (130, 160), (2, 64, 64), (3, 200, 352)])
def test_unpack_is_the_exact_inverse_of_fragments(layout: Any, name: str, shape: tuple[int, ...]) -> None:
    fragments = import_module("microscale.backends.triton.fragments")
    w = suitable_bytes(name, shape)
    assert fragments.suits(w)
    packed = fragments.pack(w)
    with pytest.warns(UserWarning, match="kept a second time"):
        plain = packed.plain
    for back in (fragments.unpack(packed), layout.unpack(plain)):
        assert (back.format, back.shape, back.rule) == (w.format, w.shape, w.rule)
        assert torch.equal(back.codes, w.codes)
        assert torch.equal(back.scales, w.scales)
        assert (back.tensor_scale is None) == (w.tensor_scale is None)


@pytest.mark.parametrize("name", FORMATS)
def test_fragments_are_for_bytes_that_the_layout_can_hold(layout: Any, name: str) -> None:
    fragments = import_module("microscale.backends.triton.fragments")
    w = suitable_bytes(name, (64, 64))
    element = w.format.element
    assert fragments.suits(w)
    for code, value in enumerate(element.values):
        if abs(value) == float("inf") or value != value:
            codes = w.codes.clone()
            codes[-1, -1] = code
            assert not fragments.suits(replace(w, codes=codes)), code
    if w.format.scale == "f32":
        return
    codes = torch.full_like(w.codes, 0x55)  # no zero among them
    least, greatest = layout.exponent_range(element, torch.bfloat16) if w.format.scale == "e8m0" else (0, 126)
    for scale, good in (
        (least, True),
        (greatest, True),
        (greatest + 1, False),
        (255, False),
        (least - 1, False),
    ):
        if scale >= 0:
            scales = torch.full_like(w.scales, least)
            scales[-1, -1] = scale
            assert fragments.suits(replace(w, codes=codes, scales=scales)) == good, scale
    # Where there are only zeros a scale of 0 does no harm.
    assert fragments.suits(replace(w, codes=torch.zeros_like(codes), scales=torch.zeros_like(w.scales)))
    short = random_bytes(name, (64, 48))
    short.codes.zero_()
    assert not fragments.suits(short)


def test_block_scales_are_powers_of_two_and_ratios(layout: Any) -> None:
    """What a block's products are multiplied by on the way through a row's ratios is its scale; 0 and NaN, too."""
    fragments = import_module("microscale.backends.triton.fragments")
    w = suitable_bytes("fp8_block128", (300, 480))
    w.scales.copy_(torch.randn_like(w.scales) * 2.0 ** torch.randint(-90, 6, w.scales.shape))
    w.scales[0, 1], w.scales[1, 2] = 0.0, float("nan")
    assert fragments.suits(w)
    packed = fragments.pack(w)
    fields = packed.scales[0] >> 7 & 255
    assert torch.equal(
        packed.scales[0], fields << 7 | fields << 23 | (fields >> 1) | (fields & 1) << 31 | fields << 15
    )
    powers = torch.where(fields == 0, 0.0, 2.0 ** (fields.double() - 127 - 120))[:, :, 0]
    ratios = packed.ratios[0].double()
    rest = ratios.flip(1).cumprod(1).flip(1)[:, 1:]  # of each block the ratios after it
    assert ((ratios[:, 1:-1].abs() > 0.49) & (ratios[:, 1:-1].abs() < 2.01) | ratios[:, 1:-1].isnan()).all()
    found = rest.repeat_interleave(2, 0)[:5].repeat_interleave(2, 1) * powers
    wanted = w.scales.double().repeat_interleave(2, 0)[:5].repeat_interleave(2, 1)
    wanted[2:4, :4] = float("nan")  # a NaN reaches all sums of its rows
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found == 0, wanted == 0)
    good = ~(wanted.isnan() | (wanted == 0))
    assert ((found - wanted).abs()[good] <= 2.0**-21 * wanted.abs()[good]).all()
    w.scales[2, 3] = 2.0**8
    assert not fragments.suits(w)
    w.scales[2, 3] = float("inf")
    assert not fragments.suits(w)


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.scale != "e4m3"])
def test_the_hopper_kernels_decode_what_fragments_holds(layout: Any, name: str) -> None:
    """The kernel's rotations and masks, bit for bit, on integers: every code comes out where wgmma wants it."""
    fragments = import_module("microscale.backends.triton.fragments")
    placement = import_module("microscale.backends.triton.placement")
    w = suitable_bytes(name, (128, 128))
    w.scales.fill_(1 if w.scales.is_floating_point() else 127)
    element = w.format.element
    packed = fragments.pack(w).codes[0].long() & 0xFFFFFFFF
    if element.bits == 8:
        words = packed.view(2, 2, 2, 4, 8, 4, 4).movedim(2, 5)
    else:
        rest = packed[..., 512:].unflatten(2, (4, 8, 4, 2, -1))
        words = torch.cat((packed[..., :512].unflatten(2, (4, 8, 4, 2, 2)), rest), -1)

    def rotated(v: torch.Tensor, left: int) -> torch.Tensor:
        return (v << left | v >> 32 - left) & 0xFFFFFFFF

    found = [
        sum(rotated(words[..., word], left) & mask for word, left, mask in pair)
        for pair in placement.moves(element.name)
    ]
    bits = torch.stack(found, -1)
    halves = torch.stack((bits << 16 & 0xFFFFFFFF, bits & 0xFFFF0000), -1)
    if element.exponent_bits:
        values = (halves - (halves >> 31 << 32)).int().view(torch.float32).double() * 2.0 ** (
            127 - element.bias
        )
    else:  # as the two bfloat16 that the kernel adds
        code = halves >> 16
        values = ((0x4300 | code & 0x7F) << 16).int().view(torch.float32).double()
        values += ((0xC300 | code & 0x80) - 0x10000 << 16).int().view(torch.float32).double()
        values *= 2.0**-element.mantissa_bits
    # tile, chunk, warp, g, t, p, (q, h, odd row), odd column -> rows, columns
    values = values.unflatten(-2, (2, 2, 2)).permute(0, 2, 3, 8, 1, 5, 6, 7, 4, 9).reshape(128, 128)
    assert torch.equal(values, dequantize(w, torch.float64))


def bf16_pair_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """add.rn.bf16x2 of 32-bit words held in int64, for sums that are exact."""

    def floats(v: torch.Tensor) -> torch.Tensor:
        v = v & 0xFFFF0000
        return (v - (v >> 31 << 32)).int().view(torch.float32)

    def bits(v: torch.Tensor) -> torch.Tensor:
        found = v.contiguous().view(torch.int32).long()
        assert (found & 0xFFFF == 0).all()  # exact in bfloat16
        return found >> 16 & 0xFFFF

    return bits(floats(a << 16) + floats(b << 16)) | bits(floats(a) + floats(b)) << 16


def executed(text: str, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The PTX instructions that unpacking is made of, on words in int64."""
    for line in filter(None, text.splitlines()):
        operation, rest = line.strip(";").split(" ", 1)
        name, *words = [word.strip() for word in rest.split(",")]
        a, b, *more = [held[w] if w in held else torch.tensor(int(w, 0)) for w in words]
        if operation == "shl.b32":
            found = a << b
        elif operation == "shf.l.wrap.b32":
            assert torch.equal(a, b)
            found = a << more[0] | a >> 32 - more[0]
        elif operation == "and.b32":
            found = a & b
        elif operation == "lop3.b32":
            found = torch.zeros_like(a | b | more[0])
            for i in range(8):
                if int(more[1]) >> i & 1:
                    found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (more[0] if i & 1 else ~more[0])
        else:
            assert operation == "add.rn.bf16x2", line
            found = bf16_pair_sum(a, b)
        held[name] = found & 0xFFFFFFFF
    return held


@pytest.mark.parametrize("element", sorted({fmt.element.name for fmt in FORMATS.values()}))
def test_the_instructions_bring_codes_to_bfloat16(layout: Any, element: str) -> None:
    """As `placement` says, for random words; the instructions for 4 bits are written out, and must agree with it."""
    decode = import_module("microscale.backends.triton.hopper_decode")
    placement = import_module("microscale.backends.triton.placement")
    names = [f"w{i}" for i in range(placement.words(element))]
    words = torch.randint(2**32, (len(names), 1000), dtype=torch.int64)
    held = executed(decode._unpacking(element, names), dict(zip(names, words, strict=True)))
    for pair, name in zip(placement.moves(element), decode._PAIRS, strict=True):
        wanted = sum((words[i] << left | words[i] >> 32 - left) & 0xFFFFFFFF & mask for i, left, mask in pair)
        if element == "int8":  # integers from -128 to 127 as bfloat16, both halves
            halves = torch.stack((wanted & 0xFF, wanted >> 16 & 0xFF))
            values = (halves - (halves >> 7 << 8)).bfloat16().view(torch.int16).long() & 0xFFFF
            wanted = values[0] | values[1] << 16
        assert torch.equal(held[name], wanted), name


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


# w13's activations: kind, gated, interleaved, with a bias.
ACTIVATIONS = (("swiglu_oai", True, True, True), ("silu", True, False, False), ("silu", False, False, True))


def in_blocks(cut: Any, tokens: int) -> str:
    """The type of a descriptor for bulk copies."""
    from triton.experimental.gluon import language as gl

    block = [tokens, 64 * cut.copied]
    return f"tensordesc<bf16{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"


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
    whole = half = rest = "*bf16"
    if cut.bulk:
        cuts = import_module("microscale.backends.triton.cuts")
        main, more = cuts.split(cut.block_m)
        whole, rest = in_blocks(cut, main), in_blocks(cut, more or main)
        half = in_blocks(cut, cuts.tail_of(cut.block_m)) if cut.tail else whole
    ids = "*i64" if direct else "*i32"
    return cut.constants(packed) | {
        "codes": "*i32",
        "scales": "*i32",
        "ratios": "*fp32" if packed.ratios is not None else None,
        **dict.fromkeys(("tile_experts", "tile_starts", "ends", "order"), ids),
        **dict.fromkeys(("M", "N", "K", "WIDTH", "TILES", "CHUNKS", "STEPS", "top_k"), "i32"),
        **dict.fromkeys(("experts", "known"), "i32"),
        **dict.fromkeys(("alpha", "beta", "limit"), "fp32"),
        **dict.fromkeys(("y", "shares"), "*bf16"),
        "whole": whole,
        "half": half,
        "rest": rest,
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
        "EARLY": 16,
    }


def packed_weights(name: str, k: int) -> Any:
    return import_module("microscale.backends.triton.fragments").pack(suitable_bytes(name, (2, 128, k)))


def modules() -> list[Any]:
    return [import_module(f"microscale.backends.triton.{n}") for n in ("hopper", "hopper_moe", "cuts")]


def for_hopper(kernel: Any, arguments: dict[str, Any], cut: Any) -> Any:
    """The tokens that a kernel reads come in bulk if its cut says so, h of `_first_kernel` being what it writes."""
    options = {"num_warps": cut.warps} | {k: arguments[k] for k in ("maxnreg",) if k in arguments}
    read = "h" if kernel.fn.__name__ == "_second_kernel" else "x"
    arguments = {"x": "*bf16", "h": "*bf16"} | arguments
    for suffix, what in (("", "whole"), ("_half", "half"), ("_rest", "rest")):
        arguments[read + suffix] = arguments[what]
    return compiled(kernel, "sm_90", arguments, options, ("K", "N", "WIDTH"))


@pytest.mark.parametrize(
    "name, activation, block_m, overlap, parts, direct, tail, bulk",
    [
        ("mxfp4", ACTIVATIONS[0], 8, False, 1, True, False, 0),
        ("mxfp4", ACTIVATIONS[0], 64, True, 1, False, True, 4),
        ("nvfp4", ACTIVATIONS[1], 128, True, 1, False, True, 0),
        ("nvfp4", ACTIVATIONS[1], 64, True, 3, False, False, 0),
        ("nvfp4", ACTIVATIONS[2], 64, True, 1, False, True, 1),
        ("mxfp8_e5m2", ACTIVATIONS[2], 32, True, 1, False, True, 0),
        ("mxfp8_e4m3", ACTIVATIONS[1], 64, True, 1, False, True, 4),
        ("mxfp6_e3m2", ACTIVATIONS[0], 8, False, 1, True, False, 0),
        ("mxfp6_e2m3", ACTIVATIONS[0], 64, True, 1, False, True, 4),
        ("mxint8", ACTIVATIONS[1], 16, True, 2, False, False, 0),
        ("fp8_block128", ACTIVATIONS[0], 64, True, 1, False, True, 0),
        ("fp8_block128", ACTIVATIONS[1], 8, False, 1, True, False, 0),
        ("fp8_block128", ACTIVATIONS[0], 64, True, 1, False, True, 4),
        ("mxfp4", ACTIVATIONS[0], 96, True, 1, False, True, 4),
        ("nvfp4", ACTIVATIONS[1], 80, True, 1, False, True, 4),
        ("fp8_block128", ACTIVATIONS[2], 72, True, 1, False, True, 4),
    ],
)
def test_the_hopper_kernels_keep_weights_in_registers(
    layout: Any, name: str, activation: tuple[str, bool, bool, bool],
    block_m: int, overlap: bool, parts: int, direct: bool, tail: bool, bulk: int,
) -> None:  # fmt: skip
    hopper, experts, cuts = modules()
    cut = cuts.Cut(block_m, 2, 2 if parts == 1 else 1, 8, 3, overlap, tail, bulk)
    arguments = given(packed_weights(name, 160), cut, activation, parts, direct, "*bf16")
    for kernel in (hopper._linear_kernel, experts._first_kernel, experts._second_kernel):
        ptx = for_hopper(kernel, arguments, cut).asm["ptx"]
        products = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (\S)", ptx)
        # A brace: the left operand is a list of registers.
        assert set(products) == {"{"}
        if overlap:  # one product waits for the one before it, so that two are under way
            pending = 2 * (2 if cuts.split(block_m)[1] else 1) if bulk else parts
            assert f"wgmma.wait_group.sync.aligned {pending};" in re.sub(r"\s+", " ", ptx)
        assert not arguments["ODD"] or not serialized(ptx)
        # Tokens by bulk copies, and codes by loads of 16 bytes.
        assert ("cp.async.bulk.tensor" in ptx) == (bulk > 0)
        if bulk:
            assert "ld.global.v4.b32" in ptx
            assert "cp.async.cg" not in ptx


def serialized(ptx: str) -> str:
    """What ptxas says if it lets no two products be under way; that is all that tells of it, but for the time.

    It does so for some kernels of `hopper_bulk` with an even number of steps, whose loop starts the last product.
    """
    from triton.knobs import nvidia

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "\n".join(line for line in said.splitlines() if "serialized" in line)


def table_kernels() -> list[tuple[Any, Any, int, str]]:
    """(kernel, cut, parts of the activations, format): what the tables can select, formats of a group taking turns."""
    hopper, experts, cuts = modules()
    found = []
    for name, (linear, moe) in cuts.table().items():
        formats = [fmt for fmt in FORMATS.values() if cuts.group(fmt) == name]
        turn = cycle(formats)
        kernels = [(hopper._linear_kernel, row.cut) for row in linear]
        kernels += [(experts._first_kernel, row.first) for row in moe]
        kernels += [(experts._second_kernel, row.second) for row in moe]
        for kernel, cut in dict.fromkeys(kernels):
            fmt = next(turn)
            found.append((kernel, cut.fitted(fmt, 1), 1, fmt.name))
        for kernel in (experts._first_kernel, experts._second_kernel, hopper._linear_kernel):
            for tokens, parts in product((8, 64), (2, 3)):
                fmt = next(turn)
                found.append((kernel, cuts._in_parts(tokens).fitted(fmt, parts), parts, fmt.name))
    return found


def cut_jobs() -> list[tuple[int, str, tuple[str, bool, bool, bool], int, bool]]:
    """(number in `table_kernels`, format, activation, K, single token): each kernel once, the rest taking turns."""
    hopper, experts, cuts = modules()
    jobs = []
    for i, (kernel, cut, _, own) in enumerate(table_kernels()):
        # w2 and linear know of an activation only whether there is a bias.
        activations = ACTIVATIONS if kernel is experts._first_kernel else ACTIVATIONS[:2]
        # A single token has no more than 8 rows, and a linear no routes.
        direct = (False, True) if cut.block_m == 8 and kernel is not hopper._linear_kernel else (False,)
        options = list(product(activations, (192, 512), direct))
        names = [own]
        if os.environ.get("MICROSCALE_TEST_EVERY_CUT") == "1":
            names = [n for n, fmt in FORMATS.items() if cuts.group(fmt) == cuts.group(FORMATS[own])]
        else:
            options = [options[5 * i % len(options)]]
        jobs += [(i, name, *option) for name, option in product(names, options)]
    return jobs


def compile_cut(job: tuple[int, str, tuple[str, bool, bool, bool], int, bool]) -> Made:
    """One of `cut_jobs`, in a process of its own."""
    i, name, activation, k, single = job
    kernel, cut, parts, _ = table_kernels()[i]
    bias = "*bf16" if activation[3] else None
    arguments = given(packed_weights(name, k), cut, activation, parts, single, bias)
    result = made("sm_90", lambda: for_hopper(kernel, arguments, cut))
    slow = serialized(result.text) if arguments["ODD"] and result.text else ""
    return replace(result, error=slow) if slow else result


def test_every_cut_of_the_tables_compiles(layout: Any) -> None:
    """By default each kernel once, with formats, activations, sizes and single tokens taking turns."""
    results = all_of(compile_cut, cut_jobs())
    assert len(results) >= len(table_kernels()) > 0
    failed = [
        (str(table_kernels()[job[0]]), job, result)
        for job, result in results.items()
        if result.error or not result.code or result.shared > TARGETS["sm_90"].shared
    ]
    assert not failed


def test_the_kernel_that_puts_tokens_in_order_compiles(layout: Any) -> None:
    ordering = import_module("microscale.backends.triton.ordering")
    given = {
        **dict.fromkeys(("ordered", "x"), "*bf16"),
        **dict.fromkeys(("order", "ends"), "*i32"),
        **dict.fromkeys(("top_k", "experts", "K"), "i32"),
    }
    made = compiled(ordering._in_order_kernel, "sm_90", given | {"BLOCK": 1024, "PDL": True}, {}, ("K",))
    assert "ld.global.v4.b32" in made.asm["ptx"]


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
