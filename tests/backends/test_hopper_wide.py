"""`hopper_wide.cu` and `hopper_linear.cu` with no GPU: compiled for one, and run on the CPU by `hopper_emulated.h`."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.formats import FORMATS
from microscale.quant import QuantTensor, quantize
from microscale.tolerance import linear_budget, moe_budget

FEW = ("mxfp4", "nvfp4", "fp8_block128", "mxfp8_e4m3", "mxfp6_e3m2", "mxint8")


def cut(word: str) -> Any:
    return import_module("microscale.backends.triton.cuts").Cut.parse(word)


@pytest.fixture
def linear(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    linears = import_module("microscale.backends.triton.hopper_linear")
    # As `Box` of `hopper_emulated.h` has it.
    monkeypatch.setattr(
        linears, "box_map", lambda x, rows: struct.pack("Qiii108x", x.data_ptr(), *x.shape, rows)
    )
    return linears.linear


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def packed(w: QuantTensor) -> Any:
    return import_module("microscale.backends.triton.fragments").pack(w)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("tokens", [1, 70])
def test_a_linear_is_within_the_permitted_error(
    linear: Callable[..., Tensor], name: str, tokens: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Rows and columns that do not fill a tile; more units than programs, and steps than stages.
    w = quantize(random(generator, 328, 352), name)
    x, bias = random(generator, tokens, 352).bfloat16(), random(generator, 328)
    results = {}
    words = {"m40t2c1w12s3x": None, "m48t3c1w16s3x": bias, "m24t4c1w12s3x": bias, "m56t1c1w8s3x": bias}
    words["m8t1c1w8s3x"] = bias
    # What full programs leave of 70 tokens, with twice the tiles: one such unit, or more than one for each program.
    words |= {"m40t2c1w12s3x24": bias, "m56t1c1w8s4x8": bias, "m24t4c1w12s3x16": bias, "m48t2c1w12s3x8": bias}
    for word, given in words.items():
        results[word] = linear(x, packed(w), given, cut(word))
        worst = linear_budget(x, w, given).worst(results[word])
        assert worst <= 1, f"{word}: error is {worst:.3g} times the permitted one"
    same = [y for word, y in results.items() if words[word] is bias]
    assert all(torch.equal(same[0], y) for y in same[1:])


def table_of(ids: Tensor, experts: int, most: int) -> Any:
    """As `routing.route` makes it on a GPU; -1 and ids that are not here have no place."""
    routing = import_module("microscale.backends.triton.routing")
    flat = ids.flatten()
    here = ((flat >= 0) & (flat < experts)).nonzero().flatten()
    order = here[flat[here].argsort(stable=True)]
    counts = flat[here].bincount(minlength=experts)
    ends = counts.cumsum(0)
    tiles = [
        (e, int(ends[e] - counts[e]) + most * i)
        for e in range(experts)
        for i in range(-(-int(counts[e]) // most))
    ]
    tiles += [(-1, 0)] * 3
    number = partial(torch.tensor, dtype=torch.int32)
    return routing.Table(
        torch.cat((order, order.new_full((len(flat) - len(order),), 1 << 30))).int(),
        ends.int(),
        number([e for e, _ in tiles]),
        number([s for _, s in tiles]),
        number([0, len(tiles) - 3] + [0] * len(tiles)),
        len(tiles),
    )


@pytest.mark.parametrize("name", FEW[:3])
@pytest.mark.parametrize(
    "activation",
    [GPT_OSS, Activation("silu"), Activation("swiglu_step", limit=1.0), Activation("silu", gated=False)],
    ids=lambda a: a.kind,
)
def test_experts_are_within_the_permitted_error(
    emulated: Any, name: str, activation: Activation, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The last expert has no token, the first about two thirds: more than a tile.
    ids = (random(generator, 70, 2) > 0.5).long()
    ids[0] = -1
    results = [
        of_experts(emulated, name, activation, ids, 3, seed, word, monkeypatch, listed=listed)
        for word, listed in (("m48t4c1w12s3x", True), ("m64t4c1w12s5x", False), ("m80t3c1w16s4x", True))
    ]
    assert all(torch.equal(results[0], y) for y in results[1:])


@pytest.mark.parametrize("name", ["mxfp4", "fp8_block128"])
def test_numbers_of_steps_and_of_stages_do_not_matter(
    emulated: Any, name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, four and seven steps, with as few stages as there may be and more; in turns of two and of four."""
    given = emulated, name, GPT_OSS, (torch.arange(60)[:, None] % 3 > 0).long(), 2, seed
    for columns in ((64, 448), (256, 64)):
        words = [f"m48t4c1w12s{stages}x" for stages in (3, 4, 5)]
        words += ["m48t6c1w16s4x", "m48t6c1w16s7x", "m56t6c1w16s4x"]
        fewest, *more = (of_experts(*given, word, monkeypatch, columns) for word in words)
        assert all(torch.equal(fewest, y) for y in more)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("activation", [GPT_OSS, Activation("silu")], ids=lambda a: a.kind)
def test_three_tiles_a_group_give_the_same_bits(
    emulated: Any, name: str, activation: Activation, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten tiles of w13 are one more than a program has, and of NVFP4 nine have more scales than threads copy at once.
    With gates and ups that lie apart it is four groups of two."""
    given = emulated, name, activation, (torch.arange(60)[:, None] % 3 > 0).long(), 2, seed
    words = ("m48t4c1w12s4x", "m24t9c1w16s4x", "m40t9c1w16s8x", "m48t9c1w16s6x", "m24t8c1w20s4x")
    rest = monkeypatch, (640, 320)
    found = [of_experts(*given, word, *rest, listed=i % 2 == 0) for i, word in enumerate(words)]
    monkeypatch.setattr(emulated, "FEW_COLUMNS", 0)  # codes by the copying engine, too, nine and eight tiles
    found += [of_experts(*given, word, *rest) for word in ("m24t9c1w16s4x", "m24t8c1w20s4x")]
    assert all(torch.equal(found[0], y) for y in found[1:])


@pytest.mark.parametrize(
    "columns, programs, word",
    [
        ((1216, 320), 4, "m24t9c1w16s4x"),  # two of three tiles of tokens keep one unit of three
        ((1216, 320), 2, "m24t9c1w16s4x"),  # one does, and two are whole
        ((640, 608), 4, "m40t9c1w16s4x"),  # one of two keeps none of two, as w13 is late
        ((640, 608), 6, "m40t9c1w16s4x"),  # both, and all units are of the first round or the last
        ((1216, 608), 7, "m24t9c1w16s4x"),  # one of three is whole, one keeps one unit, one none
        ((1216, 608), 7, "m40t9c1w16s4x"),  # more than there are programs would be needed, so none is
        ((1216, 320), 5, "m48t6c1w12s4x"),  # two groups of warps have usual units alone
    ],
)
def test_smaller_units_that_fill_a_last_round_give_the_same_bits(
    emulated: Any,
    columns: tuple[int, int],
    programs: int,
    word: str,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = emulated, "mxfp4", GPT_OSS, (torch.arange(60)[:, None] % 3 > 0).long(), 2, seed
    usual = of_experts(*given, "m48t4c1w12s4x", monkeypatch, columns)
    monkeypatch.setattr(emulated, "launch", partial(emulated.launch, programs=programs, seed=seed))
    assert torch.equal(of_experts(*given, word, monkeypatch, columns), usual)


@pytest.mark.parametrize("activation", [GPT_OSS, Activation("silu")], ids=lambda a: a.kind)
def test_the_only_tile_is_done_with_w13_before_w2(
    emulated: Any, activation: Activation, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group that copies is at the tile's units of w2 when others are still at those of w13."""
    ids = torch.ones(20, 1, dtype=torch.long)
    for word, listed in (("m48t4c1w12s3x", False), ("m24t9c1w16s4x", True)):
        of_experts(emulated, "mxfp4", activation, ids, 2, seed, word, monkeypatch, listed=listed)


def of_experts(
    emulated: Any, name: str, activation: Activation, ids: Tensor, experts: int, seed: int, word: str,
    monkeypatch: pytest.MonkeyPatch, columns: tuple[int, int] = (96, 192), listed: bool = True,
) -> Tensor:  # fmt: skip
    """Checked against what is permitted. `columns`: of w13 and w2; `listed`: programs sort routes themselves."""
    monkeypatch.setattr(emulated.nvrtc, "refuse", lambda: None)
    generator = torch.Generator().manual_seed(seed)
    (tokens, top_k), (hidden, inner) = ids.shape, columns
    w13 = quantize(random(generator, experts, activation.rows(inner), hidden) / 8, name)
    w2 = quantize(random(generator, experts, hidden, inner) / 8, name)
    x, share = random(generator, tokens, hidden).bfloat16(), random(generator, tokens, top_k).softmax(-1)
    b13 = random(generator, *w13.shape[:2]).bfloat16()
    biases = b13, random(generator, *w2.shape[:2]).bfloat16().float()
    matrices = packed(w13), packed(w2)
    one, _ = emulated.taken((cut(word), cut(word)), matrices, activation, biases, share, False)
    assert one.wide
    monkeypatch.setattr(emulated, "zeros", lambda count, _: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(
        emulated.routing, "route", lambda ids, _map, experts, most, _pdl: table_of(ids, experts, most)
    )
    with monkeypatch.context() as patched:
        if not listed:
            patched.setattr(emulated, "ROOMS", ())
        shares = emulated.experts(x, ids, share, *matrices, biases, activation, one)
    there = (ids >= 0)[..., None]
    y = torch.where(there, shares.view(tokens, top_k, hidden), 0).float().sum(1).bfloat16()
    worst = moe_budget(x, ids, share, w13, w2, activation, b13=biases[0], b2=biases[1]).worst(y)
    assert worst <= 1, f"error is {worst:.3g} times the permitted one"
    return y


KINDS = [
    (True, {"bias": (1, 2), "weights": 2, "kind": "swiglu_oai", "gated": True, "limit": True}),
    (True, {"weights": 1, "kind": "silu", "gated": True, "apart": True}),
    (True, {"weights": 2, "scale": "f32"}),
]


# Of 4 bits: others have no registers for so many.
MANY_TILES = ("m24t9c1w16s8x", "m32t9c1w16s8x", "m40t9c1w16s8x", "m48t9c1w16s8x", "m40t8c1w20s8x")
WORDS = (
    "m48t4c1w12s12x",
    "m64t4c1w12s10x",
    "m80t4c1w12s10x",
    "m144t3c1w16s8x",
    "m144t4c1w12s8x",
    "m256t2c1w12s5x",
    "m64t6c1w16s6x",
    "m80t6c1w16s6x",
    *MANY_TILES,
)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("rest", [rest for _, rest in KINDS])
def test_it_compiles_and_no_product_waits_for_another(source: Any, word: str, rest: dict[str, Any]) -> None:
    nvrtc = import_module("microscale.backends.triton.nvrtc")
    if nvrtc.refuse() is not None:
        pytest.skip(nvrtc.refuse())
    shape = cut(word)
    if rest.get("apart"):
        if shape.block_m > source.MOST_OF_TWO:
            return  # `hopper_wide.taken` has no such kernel
        shape = shape.of_experts(packed(quantize(torch.randn(2, 256, 64), "mxfp4")), apart=True)
    elements = {"e4m3": ("e2m1",), "f32": ("e4m3",)}.get(rest.get("scale"), ("e2m1", "e4m3"))
    if word in MANY_TILES:
        elements = ("e2m1",)
        rest = rest | {"scale": {"f32": "e4m3"}.get(rest.get("scale"), "e8m0")}
    for element in elements:
        given = {"scale": "e8m0"} | rest
        spec = source.Spec(
            True, element, most=shape.block_m, stages=shape.stages, users=shape.users,
            each=shape.tiles // shape.users, even=True, **given,
        )  # fmt: skip
        static = compiles(nvrtc, source, spec)
        if element == "e2m1" and spec.scale == "e8m0":
            assert spec.shared + static <= shape.shared(FORMATS["mxfp4"], 1) <= 227 << 10


def compiles(nvrtc: Any, source: Any, spec: Any) -> int:
    """Bytes of static shared memory."""
    log = nvrtc.compiled("x.cu", source.text(spec), ["--ptxas-options=-v"])[1]
    assert "serialized" not in log, log
    # Whoever asks for more registers than the others gave up waits for ever.
    launched = int(log.partition("Used ")[2].partition(" registers")[0])
    copies, multiplies = spec.registers
    assert copies <= launched <= multiplies
    assert 128 * copies + 128 * spec.users * multiplies <= launched * spec.threads <= 65536
    if not spec.experts:
        assert " 0 bytes spill stores" in log, log
    return int(log.rpartition(" bytes smem")[0].rpartition(" ")[2])


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp6_e3m2", "fp8_block128"])
def test_linears_of_the_tables_compile_and_no_product_waits_for_another(source: Any, name: str) -> None:
    nvrtc, cuts = (import_module(f"microscale.backends.triton.{m}") for m in ("nvrtc", "cuts"))
    if nvrtc.refuse() is not None:
        pytest.skip(nvrtc.refuse())
    fmt = FORMATS[name]
    rows = cuts.table()[cuts.group(fmt)][0]
    wide = {c.fitted(fmt, 1) for row in rows for c in row.cuts if c.wide}
    assert wide
    for shape in wide:
        spec = source.Spec(
            False, fmt.element.name, fmt.scale, shape.block_m, shape.stages, shape.users,
            shape.tiles // shape.users, even=True, bias=(1,), row_scale=(fmt.tensor_scale,),
        )  # fmt: skip
        assert spec.shared + compiles(nvrtc, source, spec) <= shape.shared(fmt, 1) <= 227 << 10


def portable(text: str) -> str:
    """The text as PTX."""
    compiler = import_module("cuda.bindings.nvrtc")
    _, program = compiler.nvrtcCreateProgram(text.encode(), b"hopper_wide.cu", 0, [], [])
    options = [b"--gpu-architecture=compute_90a", b"--std=c++17", b"-default-device"]
    (error,) = compiler.nvrtcCompileProgram(program, len(options), options)
    assert error == compiler.nvrtcResult.NVRTC_SUCCESS
    _, size = compiler.nvrtcGetPTXSize(program)
    found = bytes(size + 1)
    compiler.nvrtcGetPTX(program, found)
    compiler.nvrtcDestroyProgram(program)
    return found.decode()


touches = re.compile(r"\b(ld\.global|ld\.b|st\.global|st\.b|cp\.async(?!\.bulk\.prefetch))").search


def touches_nothing(before: str) -> None:
    """PTX, up to the wait for the kernel ahead."""
    assert not touches(before)
    for label in re.findall(r"\bbra(?:\.uni)?\s+(\S+);", before):
        assert f"{label}:" in before  # no block that stands elsewhere in the text


LINEARS = [
    (False, {"bias": (0,), "row_scale": (False,)}),
    (False, {"bias": (1,), "row_scale": (True,), "scale": "e4m3"}),
]


@pytest.mark.parametrize(("experts", "rest"), [*KINDS, *LINEARS])
def test_the_compiler_leaves_memory_for_behind_the_wait(
    source: Any, experts: bool, rest: dict[str, Any]
) -> None:
    nvrtc = import_module("microscale.backends.triton.nvrtc")
    if nvrtc.refuse() is not None:
        pytest.skip(nvrtc.refuse())
    given = {"scale": "e8m0", "element": "e4m3" if rest.get("scale") == "f32" else "e2m1"} | rest
    spec = source.Spec(experts, most=128, stages=6, each=2, even=True, **given)
    text = portable(source.text(spec))
    if experts:  # before the groups part, as all of them may find tiles
        before, behind = text.split("griddepcontrol.wait")
        touches_nothing(before)
        assert touches(behind)
        return
    # What comes before the groups part, and of each group what comes before and after it waits for the kernel ahead.
    start, *groups = text.split("setmaxnreg")
    assert len(groups) == 2
    assert not touches(start)
    for group in groups:
        before, _ = group.split("griddepcontrol.wait")
        touches_nothing(before)
    assert touches(groups[1])


def test_where_cuda_cannot_be_compiled_other_kernels_run(wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    w = packed(quantize(torch.randn(64, 64), "mxfp4"))
    monkeypatch.setattr(wide.nvrtc, "refuse", lambda: None)
    bias = torch.zeros(64)
    assert not wide.refuse(w, GPT_OSS, (bias.bfloat16(), None), bias)
    assert wide.refuse(w, GPT_OSS, (bias.half(), None), bias)
    assert wide.refuse(w, GPT_OSS, (bias, None), bias.half())
    assert wide.refuse(w, Activation("gelu"), ())
    assert wide.refuse(packed(quantize(torch.randn(60, 64), "mxfp4")), None, ())
    monkeypatch.setattr(wide.nvrtc, "refuse", lambda: "no compiler")
    assert wide.refuse(w, None, ())
    for word in ("m48t4c1w12s12x", "m80t3c1w16s12x", "m144t4c1w12s8x", "m256t2c1w12s4x"):
        for tail in (False, True):
            assert not cut(word).usual(tail).wide
            assert cut(word).usual(tail).shared(w.format, 1) <= 227 << 10
    # As many tokens as an expert has, or close.
    for word, other in (("m48t4c1w12s12x", "m64t2c1w4s6oh"), ("m80t4c1w12s10x", "m80t2c1w4s3ohb4")):
        assert str(cut(word).usual(tail=True)) == other


def test_a_driver_that_describes_no_boxes_is_as_no_compiler(
    wide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears = import_module("microscale.backends.triton.hopper_linear")
    x = torch.zeros(200, 64, dtype=torch.bfloat16)
    for driver, words in (
        (SimpleNamespace(), "older than CUDA 12"),
        (
            SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 1),
            r"boxes of \(88,\) rows of \(200, 64\).*error 1",
        ),
    ):
        monkeypatch.setattr(linears, "_driver", lambda driver=driver: driver)
        with pytest.raises(wide.nvrtc.CompileError, match=words):
            linears.box_map(x, 88)
