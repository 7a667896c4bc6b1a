"""What the Triton kernels compute. Run by `test_triton.py`: on the GPU where there is one, and in Triton's interpreter
(TRITON_INTERPRET=1, which must be set before Triton is imported) on the CPU. Not collected by itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.backends import triton as backend
from microscale.backends.triton import layout, routing, tiles
from microscale.backends.triton.cuts import Cut
from microscale.backends.triton.fragments import Fragments, scale_bytes
from microscale.backends.triton.layout import exponent_range
from microscale.conformance import Case, cases, run
from microscale.elements import pack_codes
from microscale.formats import FORMATS, Format
from microscale.quant import QuantTensor, dequantize, quantize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALL = [c for c in cases() if c.act == "a16"]


def edges() -> Iterator[Case]:
    """Around one block of K, for every format: one column less, a block, one more; a single row, token or expert."""
    for name, fmt in FORMATS.items():
        block = fmt.block[1]
        for m, n, k in (
            (2, 3, block - 1),
            (1, 1, block),
            (3, 65, block + 1),
            (17, 2, 1),
            (1, 2880, 2 * block),
        ):
            yield Case("linear", name, m, n, k, bias=n > 1)
        moe = {"activation": GPT_OSS, "experts": 2, "top_k": 2}
        yield Case("moe", name, 2, block - 1, block + 1, **moe)
        yield Case("moe", name, 1, block, block, **moe | {"experts": 1, "top_k": 1}, padded=True)
        yield Case("moe", name, 2, 1, block, **moe, bias=False)


@pytest.mark.parametrize("case", [*ALL, *edges()], ids=lambda c: c.name)
def test_conformance(case: Case, seed: int) -> None:
    worst = run(case, backend, DEVICE, torch.Generator().manual_seed(seed))
    assert worst <= 1.0, f"error is {worst:.3g} times the permitted one"


def strided(t: Tensor) -> Tensor:
    """The same numbers, with NaN (or an id out of range) between them in memory."""
    room = (
        t.new_full((*t.shape, 2), 999) if not t.is_floating_point() else t.new_full((*t.shape, 2), math.nan)
    )
    room[..., 0] = t
    return room[..., 0]


def test_operands_that_do_not_lie_one_number_behind_the_other(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    w, x, bias = backend.pack(quantize(random(33, 64), "mxfp4")), random(3, 64), random(33)
    assert torch.equal(backend.linear(x, w, strided(bias)), backend.linear(x, w, bias))
    assert torch.equal(backend.linear(strided(x), w, bias), backend.linear(x, w, bias))
    w13, w2 = (backend.pack(quantize(random(2, n, 32), "mxfp4")) for n in (64, 32))
    b13, b2, routing = random(2, 64), random(2, 32), random(3, 2)
    ids = torch.tensor([[0, 3], [2, 1], [3, 3]], device=DEVICE)
    held = torch.tensor([1, -1, -1, 0], device=DEVICE)
    operands, options = (x[:, :32], ids, routing), {"b13": b13, "b2": b2, "expert_map": held}
    expected = backend.moe(*operands, w13, w2, GPT_OSS, **options)
    spread = {name: strided(t) for name, t in options.items()}
    assert torch.isfinite(expected).all()
    assert torch.equal(backend.moe(*map(strided, operands), w13, w2, GPT_OSS, **spread), expected)


def every_code(fmt: Format, scales: list[int]) -> QuantTensor:
    """A row per scale, and in it every code whose value is finite; what is infinite or NaN is code 0 here."""
    codes = torch.tensor([c if math.isfinite(v) else 0 for c, v in enumerate(fmt.element.values)])
    k = max(len(codes), 32)
    codes = codes.repeat(k // len(codes)).to(torch.uint8).expand(len(scales), k)
    stored = torch.tensor(scales, dtype=torch.uint8)[:, None].expand(-1, k // fmt.block[1]).contiguous()
    outer = torch.ones(()) if fmt.tensor_scale else None
    return QuantTensor(fmt, (len(scales), k), pack_codes(codes, fmt.element.bits), stored, outer)


def same(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(found, 3.25), torch.nan_to_num(wanted, 3.25)) and torch.equal(
        found.isnan(), wanted.isnan()
    )


@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETED else DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.scale != "f32"])
@pytest.mark.parametrize("path", ["in_tile", "on_sums"])
def test_every_code_times_every_scale_is_exact(name: str, dtype: torch.dtype, path: str) -> None:
    """Identity activations read the weights back: exact where the output's dtype holds them, else rounded once."""
    fmt = FORMATS[name]
    # All of them on a GPU; the interpreter takes some seconds for that, so there the ends and some between.
    scales = [*range(0, 256, 19), 1, 2, 126, 127, 128, 253, 254, 255] if INTERPRETED else list(range(256))
    if fmt.scale == "e8m0" and path == "in_tile":
        least, greatest = exponent_range(fmt.element, dtype)
        scales = [s for s in scales if least <= s <= greatest] + [least, greatest, 255]
    elif fmt.scale == "e4m3" and path == "on_sums":
        pytest.skip("NVFP4's block scales are exact in every dtype")
    w = every_code(fmt, scales).to(DEVICE)
    packed = layout.pack(w)
    assert packed.scale_in_tile(dtype) == (path == "in_tile")
    y = backend.linear(torch.eye(w.shape[1], dtype=dtype, device=DEVICE), packed)
    assert same(y.T, dequantize(w, torch.float64).to(dtype))


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.scale != "f32"])
def test_the_layout_of_this_gpu_is_exact_too(name: str) -> None:
    """Scales that Hopper's own layout takes, where there is one; block FP8's have a test of their own."""
    fmt = FORMATS[name]
    least, greatest = scale_bytes(fmt.element) if fmt.scale == "e8m0" else (0, 126)
    w = every_code(fmt, list(range(least, greatest + 1, 1 if not INTERPRETED else 16))).to(DEVICE)
    assert isinstance(backend.pack(w), Fragments) == tiles.target(w.device).hopper
    y = backend.linear(torch.eye(w.shape[1], dtype=torch.bfloat16, device=DEVICE), backend.pack(w))
    assert same(y.T, dequantize(w, torch.float64).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_fp8_codes_are_exact(dtype: torch.dtype) -> None:
    fmt = FORMATS["fp8_block128"]
    codes = torch.tensor(
        [c if math.isfinite(v) else 0 for c, v in enumerate(fmt.element.values)], dtype=torch.uint8
    )
    scales = torch.tensor([[1.0, 2.0**-70], [float("nan"), 3.0]])
    w = QuantTensor(fmt, (130, 256), codes.expand(130, 256).contiguous(), scales).to(DEVICE)
    y = backend.linear(torch.eye(256, dtype=dtype, device=DEVICE), backend.pack(w))
    wanted = dequantize(w, torch.float64)
    wanted[128:] = float("nan")  # a NaN scale reaches every column of its rows
    assert same(y.T, wanted.to(dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_infinite_and_nan_codes(name: str) -> None:
    fmt = FORMATS[name]
    odd = [c for c, v in enumerate(fmt.element.values) if not math.isfinite(v)]
    if not odd:
        pytest.skip(f"{fmt.element.name} has none")
    k = 128
    codes = torch.zeros(len(odd), k, dtype=torch.uint8)
    codes[:, 5] = torch.tensor(odd, dtype=torch.uint8)
    scales = torch.ones(fmt.scale_shape(len(odd), k)) if fmt.scale == "f32" else None
    if scales is None:
        scales = torch.full(fmt.scale_shape(len(odd), k), 127, dtype=torch.uint8)
    w = QuantTensor(fmt, (len(odd), k), codes, scales).to(DEVICE)
    for dtype in DTYPES:
        y = backend.linear(torch.ones(2, k, dtype=dtype, device=DEVICE), backend.pack(w))
        assert same(y[0], dequantize(w, torch.float64)[:, 5].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_nan_scale_reaches_its_rows_and_no_other(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 200, device=DEVICE).to(dtype)
    w = quantize(torch.randn(140, 200, device=DEVICE), name)
    rows = slice(0, 128) if name == "fp8_block128" else slice(7, 8)
    block = rows.start // w.format.block[0]
    w.scales[block, -1] = {"e8m0": 255, "e4m3": 0x7F, "f32": float("nan")}[w.format.scale]
    w.codes[rows] = 0
    y = backend.linear(x, backend.pack(w))
    wanted = torch.zeros(140, dtype=torch.bool, device=DEVICE)
    wanted[rows] = True
    assert torch.equal(y.isnan(), wanted.expand(3, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8_block128"])
def test_a_row_does_not_depend_on_the_others(name: str, dtype: torch.dtype) -> None:
    """To the bit. NaN in other rows, as padding tokens may hold, does not matter either.

    The interpreter multiplies with numpy, whose order of summation depends on the shape, so there only the NaN
    half of this is checked.
    """
    k, m = 160, 130
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    packed = backend.pack(quantize(torch.randn(70, k, device=DEVICE), name))
    y = backend.linear(x, packed)
    x[40:] = float("nan")
    for count in (1, 3, 17, 40, 130):
        found = backend.linear(x[:count], packed)[:40]
        if INTERPRETED:
            assert torch.isfinite(found).all()
        else:
            assert torch.equal(found, y[: min(count, 40)])


@pytest.mark.skipif(INTERPRETED, reason="numpy's order of summation depends on the shape")
@pytest.mark.parametrize("name", FORMATS)
def test_a_token_does_not_depend_on_the_others(name: str) -> None:
    x, ids, weights, w13, w2 = experts(name, tokens=130)
    y = backend.moe(x, ids, weights, w13, w2, GPT_OSS)
    assert torch.equal(y, backend.moe(x, ids, weights, w13, w2, GPT_OSS))
    for rows in (slice(0, 1), slice(3, 6), slice(7, 24), slice(90, 130)):
        assert torch.equal(backend.moe(x[rows], ids[rows], weights[rows], w13, w2, GPT_OSS), y[rows])


def experts(name: str, tokens: int = 5) -> tuple[Tensor, Tensor, Tensor, backend.Packed, backend.Packed]:
    e, hidden, i = 6, 96, 64
    x = torch.randn(tokens, hidden, device=DEVICE).bfloat16()
    ids = torch.rand(tokens, e, device=DEVICE).argsort(-1)[:, :2]
    weights = torch.rand(tokens, 2, device=DEVICE)
    w13 = backend.pack(quantize(torch.randn(e, 2 * i, hidden, device=DEVICE) / 10, name))
    w2 = backend.pack(quantize(torch.randn(e, hidden, i, device=DEVICE) / 10, name))
    return x, ids, weights, w13, w2


def test_an_id_that_does_not_exist_makes_its_token_nan() -> None:
    x, ids, weights, w13, w2 = experts("mxfp4")
    y = backend.moe(x, ids, weights, w13, w2, GPT_OSS)
    bad = ids.clone()
    bad[1, 0], bad[3, 1] = 6, -2
    found = backend.moe(x, bad, weights, w13, w2, GPT_OSS)
    assert found[[1, 3]].isnan().all()
    assert torch.equal(found[[0, 2, 4]], y[[0, 2, 4]])


def test_no_route_at_all_gives_zero() -> None:
    x, ids, weights, w13, w2 = experts("mxfp4")
    y = backend.moe(x, torch.full_like(ids, -1), weights * float("nan"), w13, w2, GPT_OSS)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("kind", ["silu", "swiglu_oai", "swiglu_step", "relu2"])
def test_nan_passes_every_clamp(kind: str) -> None:
    x, ids, weights, w13, w2 = experts("mxfp4")
    limit = None if kind == "relu2" else 1.0
    x[2] = float("nan")
    y = backend.moe(x, ids, weights, w13, w2, Activation(kind, limit=limit))
    assert torch.equal(y.isnan().all(-1), torch.arange(5, device=DEVICE) == 2)


def test_gradients_are_those_of_the_numbers() -> None:
    x = torch.randn(4, 96, device=DEVICE, requires_grad=True)
    w = quantize(torch.randn(40, 96, device=DEVICE), "mxfp4")
    upstream = torch.randn(4, 40, device=DEVICE)
    backend.linear(x, backend.pack(w)).backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ dequantize(w))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "tokens, top_k, experts, block_m", [(1, 4, 32, 8), (150, 4, 7, 64), (300, 8, 128, 16)]
)
def test_routes_are_sorted_by_expert(
    tokens: int, top_k: int, experts: int, block_m: int, mapped: bool
) -> None:
    """In one launch and in two; ids may name an expert elsewhere, none, or one that does not exist."""
    known = experts + 5 if mapped else experts
    ids = torch.randint(-1, known + 2, (tokens, top_k))
    where = torch.randperm(known) - 5 if mapped else torch.arange(known)
    where[where < 0] = -1
    table = routing.route(ids.to(DEVICE), where.to(DEVICE) if mapped else None, experts, block_m)
    local = torch.where((ids >= 0) & (ids < known), where[ids.clamp(0, known - 1)], -1).flatten()
    order = [r for e in range(experts) for r in torch.where(local == e)[0].tolist()]
    counts = [int((local == e).sum()) for e in range(experts)]
    ends = torch.tensor(counts).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    pieces = [(e, s) for e in range(experts) for s in range(starts[e], ends[e], block_m)]
    assert table.order[: len(order)].tolist() == order
    assert table.ends[:experts].tolist() == ends
    unused = [-1] * (table.count - len(pieces))
    assert table.tile_experts[: table.count].tolist() == [e for e, _ in pieces] + unused
    assert table.tile_starts[: len(pieces)].tolist() == [s for _, s in pieces]
    assert table.progress[: 2 + len(pieces)].tolist() == [0, len(pieces)] + [0] * len(pieces)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_copy_of_the_weights_serves_every_dtype(dtype: torch.dtype) -> None:
    x, ids, weights, w13, w2 = experts("mxfp4")
    if not isinstance(w13, Fragments):
        pytest.skip("this GPU has one layout for all")
    backend.moe(x.to(dtype), ids, weights, w13, w2, GPT_OSS)
    packed = backend.pack(quantize(torch.randn(70, 96, device=DEVICE), "mxfp4"))
    backend.linear(x.to(dtype), packed)
    assert not any("plain" in vars(w) for w in (w13, w2, packed))


def cuts_of(name: str) -> tuple[list[Cut], list[tuple[Cut, Cut]]]:
    """Every cut of linears, and of experts, that the tables or `bench tune` may choose for a format."""
    from microscale.backends.triton import cuts
    from microscale.bench.tune_candidates import wide_candidates

    fmt = FORMATS[name]
    linear, moe = cuts.table()[cuts.group(fmt)]
    wide, many = wide_candidates(fmt, 128), wide_candidates(fmt, 128, experts=True)
    linears = [cut.fitted(fmt, 1) for row in linear for cut in (*row.cuts, *row.mixed())]
    experts = [(a.fitted(fmt, 1), b.fitted(fmt, 1)) for row in moe for a, b in row.pairs]
    return list(dict.fromkeys(linears + wide)), list(dict.fromkeys(experts + [(c, c) for c in many]))


ROWS = (slice(0, 130), slice(3, 7), slice(3, 4))
FIRST = Cut(8, 2, 2, 4, 4)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_cut_of_linears_gives_the_same_bits(name: str, biased: bool) -> None:
    matrix = backend.pack(quantize(torch.randn(200, 416, device=DEVICE), name))
    if not isinstance(matrix, Fragments):
        pytest.skip("this GPU has no cuts")
    from microscale.backends.triton import hopper

    x = torch.randn(130, 416, device=DEVICE).bfloat16()
    bias = torch.randn(200, device=DEVICE).bfloat16() if biased else None
    y = hopper.linear(x, matrix, bias, FIRST)
    for cut in cuts_of(name)[0]:
        for rows in ROWS:
            assert torch.equal(hopper.linear(x[rows], matrix, bias, cut), y[rows]), (cut, rows)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_cut_of_experts_gives_the_same_bits(name: str, biased: bool) -> None:
    x, ids, weights, w13, w2 = experts(name, tokens=130)
    if not isinstance(w13, Fragments) or not isinstance(w2, Fragments):
        pytest.skip("this GPU has no cuts")
    from microscale.backends.triton import hopper_experts

    biases = [torch.randn(6, n, device=DEVICE) if biased else None for n in (128, 96)]
    rest = (w13, w2, GPT_OSS if biased else Activation("silu"), *biases, None, False)
    y = hopper_experts.moe(x, ids, weights, *rest, (FIRST, FIRST))
    for pair in cuts_of(name)[1]:
        for rows in ROWS:
            found = hopper_experts.moe(x[rows], ids[rows], weights[rows], *rest, pair)
            assert torch.equal(found, y[rows]), (pair, rows)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", FORMATS)
def test_experts_of_few_tokens_have_the_bits_of_other_kernels(name: str, biased: bool) -> None:
    """By `hopper_rings`, for which the test above has too few columns."""
    e, inner, hidden = 6, 576, 768
    given = (
        quantize(torch.randn(e, *nk, device=DEVICE) / 20, name)
        for nk in ((2 * inner, hidden), (hidden, inner))
    )
    w13, w2 = map(backend.pack, given)
    if not isinstance(w13, Fragments) or not isinstance(w2, Fragments):
        pytest.skip("this GPU has no cuts")
    from microscale.backends.triton import hopper_experts, hopper_rings

    b13, b2 = (torch.randn(e, n, device=DEVICE) if biased else None for n in (2 * inner, hidden))
    b13 = None if b13 is None else b13.bfloat16()
    activation = GPT_OSS if biased else Activation("silu")
    x = torch.randn(60, hidden, device=DEVICE).bfloat16()
    ids, weights = torch.randint(-1, e, (60, 4), device=DEVICE), torch.rand(60, 4, device=DEVICE)
    expert_map = torch.randint(-1, e, (9,), device=DEVICE)
    calls = (
        (2, torch.int32, None),
        (9, torch.int64, expert_map),
        (60, torch.int32, expert_map.to(torch.int32)),
    )
    for pair in (pair for pair in cuts_of(name)[1] if pair[0].rings):
        # Each kind of call is a kernel of its own. Tiles of many tokens need many.
        for m, kind, found in calls if pair[0].block_m == 8 else calls[-1:]:
            tokens = (x[:m], ids[:m].to(kind), weights[:m])
            asked = (activation, (b13, b2), *tokens[1:], found, False)
            assert hopper_rings.spec_of(pair, (w13, w2), *asked) is not None
            rest = (w13, w2, activation, b13, b2, found, False)
            wanted = hopper_experts.moe(*tokens, *rest, (FIRST, FIRST))
            for _ in range(2):
                assert torch.equal(hopper_experts.moe(*tokens, *rest, pair), wanted), (pair, m, kind)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_captured_graph_replays_the_same_result() -> None:
    x, ids, weights, w13, w2 = experts("mxfp4", tokens=33)
    wanted = backend.moe(x, ids, weights, w13, w2, GPT_OSS)
    other = [torch.randn_like(x), torch.randint_like(ids, 6), torch.rand_like(weights)]
    static = [t.clone() for t in other]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.moe(*static, w13, w2, GPT_OSS)
    for given, held in zip((x, ids, weights), static, strict=True):
        held.copy_(given)
    graph.replay()
    assert torch.equal(y, wanted)
