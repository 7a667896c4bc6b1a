"""`reference.linear` and `reference.moe` against `token_loop`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import microscale.reference
from microscale.activations import GPT_OSS, Activation
from microscale.formats import Format
from microscale.quant import QuantTensor, dequantize, quantize
from microscale.reference import linear, moe
from token_loop import (
    ACTIVATIONS,
    ACTS,
    ALL,
    assert_within,
    eps,
    exact_operands,
    expected_of,
    looped,
    operands,
    run,
    run_loop,
    small_mxfp4,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", ALL)
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3)], ids=str)
def test_linear(fmt: str, lead: tuple[int, ...], dtype: torch.dtype) -> None:
    for k, n in ((1, 1), (31, 130), (32, 3), (129, 65)):
        x, w, bias = torch.randn(*lead, k), quantize(torch.randn(n, k), fmt), torch.randn(n)
        dense = dequantize(w, torch.float64)
        for b in (None, bias):
            expected = torch.einsum("...k,nk->...n", x.double(), dense) + (0 if b is None else b.double())
            size = torch.einsum("...k,nk->...n", x.double().abs(), dense.abs()) + (
                0 if b is None else b.abs()
            )
            assert_within(linear(x, w, b, dtype=dtype), expected, (k + 4) * size, dtype)


def test_linear_by_hand() -> None:
    w, dense = small_mxfp4(9, 40)
    x = torch.randint(-2, 3, (6, 40)).float()
    bias = torch.randint(-8, 9, (9,)) / 2
    expected = [[sum(a * b for a, b in zip(r, c, strict=True)) for c in dense.tolist()] for r in x.tolist()]
    got = linear(x, w, bias, dtype=torch.float64)
    assert got.tolist() == (torch.tensor(expected, dtype=torch.float64) + bias).tolist()
    assert torch.equal(linear(x, w, bias).double(), got), "float32 is exact here, too"


@pytest.mark.parametrize("fmt", ALL)
def test_linear_empty(fmt: str) -> None:
    w = quantize(torch.randn(5, 64), fmt)
    for lead in ((0,), (3, 0), (0, 2)):
        for act in (None, *ACTS):
            y = linear(torch.randn(*lead, 64), w, torch.randn(5), act=act)
            assert (y.shape, y.dtype) == ((*lead, 5), torch.float32)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_linear_computes_in_dtype_and_not_in_that_of_x(x_dtype: torch.dtype) -> None:
    w = quantize(torch.randn(5, 64), "mxfp4")
    x, bias = torch.randn(3, 64).to(x_dtype), torch.randn(5).to(x_dtype)
    for dtype in (torch.float32, torch.float64):
        y = linear(x, w, bias, dtype=dtype)
        assert y.dtype == dtype
        assert torch.equal(y, linear(x.to(dtype), w, bias.to(dtype), dtype=dtype))


@pytest.mark.parametrize("act", ACTS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_quantises_activations_row_by_row(act: Format, dtype: torch.dtype) -> None:
    """The identity as weight shows what x became: each row as if alone, however large its neighbours are."""
    eye = quantize(torch.eye(96), "mxfp4")
    x = torch.randn(4, 96) * torch.tensor([[1.0], [1e-3], [1e4], [0.0]])
    y = linear(x, eye, act=act, dtype=dtype)
    for m in range(4):
        assert torch.equal(y[m], dequantize(quantize(x[m], act), dtype))
    assert not torch.equal(y[:3], x[:3].to(dtype)), "really quantised"
    assert torch.equal(linear(x[1:2], eye, act=act, dtype=dtype)[0], y[1])
    assert torch.equal(linear(x.reshape(2, 2, 96), eye, act=act, dtype=dtype).reshape(4, 96), y)


def test_nan_scale_reaches_its_row_of_the_weight_only() -> None:
    w, _ = small_mxfp4(6, 64)
    w.scales[2, 1] = 255
    y = linear(torch.randn(3, 64), w)
    assert y.isnan().all(dim=0).tolist() == [False, False, True, False, False, False]
    assert not y[:, [0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("a", ACTIVATIONS, ids=lambda a: f"{a.kind}-{a.gated}-{a.interleaved}-{a.limit}")
def test_moe_activations(a: Activation, dtype: torch.dtype) -> None:
    args = operands("mxfp8_e4m3", a)
    expected, bound = expected_of(args)
    assert_within(moe(**args, dtype=dtype), expected, bound, dtype)
    args = {**args, "b13": None, "b2": None}
    expected, bound = expected_of(args)
    assert_within(moe(**args, dtype=dtype), expected, bound, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", ALL)
def test_moe_formats(fmt: str, dtype: torch.dtype) -> None:
    for sizes in ({}, {"h": 1, "i": 1}, {"h": 33, "i": 130}, {"n": 7}, {"m": 1, "t": 5}, {"e": 1, "t": 1}):
        args = operands(fmt, GPT_OSS, **sizes)
        expected, bound = expected_of(args)
        assert_within(moe(**args, dtype=dtype), expected, bound, dtype)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("m, t, e", [(0, 3, 5), (1, 1, 1), (9, 1, 5), (9, 5, 5), (30, 2, 16), (4, 0, 5)])
def test_moe_exactly(m: int, t: int, e: int, gated: bool) -> None:
    args = exact_operands(Activation("relu2", gated=gated), m=m, t=t, e=e)
    y = run(args)
    assert y.shape == (m, 40)
    assert torch.equal(y, run_loop(args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_moe_takes_any_float(dtype: torch.dtype) -> None:
    args = exact_operands()
    expected = run(args)
    for name in ("x", "topk_weights", "b13", "b2"):  # small enough to be exact in each
        assert torch.equal(run({**args, name: args[name].to(dtype)}), expected), name


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_moe_takes_any_integer(dtype: torch.dtype) -> None:
    args = exact_operands()
    where = torch.tensor([4, 0, 1, 2, 3])
    expected = run({**args, "expert_map": where})
    given = {**args, "topk_ids": args["topk_ids"].to(dtype), "expert_map": where.to(dtype)}
    assert torch.equal(run(given), expected)


def test_moe_leaves_its_arguments_alone() -> None:
    args = operands(m=4, t=1)
    tensors = {k: v for k, v in args.items() if isinstance(v, Tensor)}
    before = {k: v.clone() for k, v in tensors.items()}
    moe(**args, weight_on_input=True)
    assert all(torch.equal(before[k], v) for k, v in tensors.items())


def test_token_order_and_company_do_not_matter_where_sums_are_exact() -> None:
    args = exact_operands(m=20)
    y = run(args)
    order = torch.randperm(20)
    per_token = ("x", "topk_ids", "topk_weights")
    assert torch.equal(run({**args, **{k: args[k][order] for k in per_token}}), y[order])
    for m in (0, 7, 19):
        assert torch.equal(run({**args, **{k: args[k][m : m + 1] for k in per_token}}), y[m : m + 1])
    slots = torch.randperm(3)
    assert torch.equal(run({**args, **{k: args[k][:, slots] for k in per_token[1:]}}), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_company_matters_by_rounding_only(dtype: torch.dtype) -> None:
    """torch's product sums in an order that depends on M: not bit for bit, but each within its own bound."""
    args = operands("nvfp4", m=20)
    y = moe(**args, dtype=dtype)
    _, bound = expected_of(args)
    for m in (0, 19):
        alone = {**args, **{k: args[k][m : m + 1] for k in ("x", "topk_ids", "topk_weights")}}
        difference = (moe(**alone, dtype=dtype)[0] - y[m]).abs()
        assert (difference <= 2.02 * eps(dtype) * bound[m]).all()


@pytest.mark.parametrize("act", ACTS, ids=lambda f: f.name)
def test_moe_quantises_both_inputs(act: Format) -> None:
    """h is exact here, so its codes are certain, and only the second product can round."""
    args = {**exact_operands(), "act": act}
    args["x"] = args["x"] * torch.tensor([1.0, 1024.0, 1 / 64]).repeat(3)[:, None]
    w13, w2 = args["dense"]
    given = {k: v for k, v in args.items() if k not in ("w13", "w2", "activation", "dense", "dtype")}
    given["ids"], given["weights"] = given.pop("topk_ids"), given.pop("topk_weights")
    expected, bound = looped(w13=w13, w2=w2, a=args["activation"], **given)
    got = run(args)
    assert_within(got, expected, bound, torch.float64)
    unquantised = run({**args, "act": None})
    assert ((got - unquantised).abs() > 4 * eps(torch.float64) * bound).any(), (
        "w2's input was really quantised"
    )


def test_expert_map() -> None:
    args = exact_operands(m=40, t=4, e=8)
    whole = run(args)
    parts = []
    for here in ([0, 5, 6], [7, 1], [2, 3, 4]):  # three ranks, local order not the global one
        where = torch.full((8,), -1)
        where[here] = torch.arange(len(here))
        local = {
            "w13": pick(args["w13"], here),
            "w2": pick(args["w2"], here),
            "b13": args["b13"][here],
            "b2": args["b2"][here],
            "dense": tuple(d[here] for d in args["dense"]),
            "expert_map": where,
        }
        parts.append(run({**args, **local}))
        assert torch.equal(parts[-1], run_loop({**args, **local}))
        absent = (where[args["topk_ids"]] < 0).all(dim=1)
        assert (parts[-1][absent] == 0).all()
    assert torch.equal(sum(parts), whole)
    nobody = run({**args, "expert_map": torch.full((8,), -1)})
    assert torch.equal(nobody, torch.zeros_like(whole))


def test_expert_map_may_be_longer_than_e_and_repeat() -> None:
    args = exact_operands(e=5)
    ids = args["topk_ids"]
    where = torch.tensor([-1, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, -1])  # two copies of each expert
    expected = run(args)
    assert torch.equal(run({**args, "topk_ids": ids + 1, "expert_map": where}), expected)
    assert torch.equal(run({**args, "topk_ids": ids + 6, "expert_map": where}), expected)


def pick(w: QuantTensor, experts: list[int]) -> QuantTensor:
    return replace(w, shape=(len(experts), *w.shape[1:]), codes=w.codes[experts], scales=w.scales[experts])


@pytest.mark.parametrize("mapped", [False, True])
def test_padding_ids(mapped: bool) -> None:
    args = exact_operands(m=12)
    if mapped:
        args["expert_map"] = torch.tensor([3, 0, -1, 4, 2])
    ids, weights = args["topk_ids"], args["topk_weights"]
    ids[0], ids[1, 1], ids[5, 0], ids[5, 2] = -1, -1, -1, -1
    expected = run_loop(args)
    weights[ids < 0] = torch.nan  # never read
    y = run(args)
    assert torch.equal(y, expected)
    assert (y[0] == 0).all()
    ids.fill_(-1)
    assert torch.equal(run(args), torch.zeros(12, 40, dtype=torch.float64))


def test_duplicate_ids_count_twice() -> None:
    args = exact_operands(t=7, e=5)  # more slots than experts: each row has duplicates
    y = run(args)
    assert torch.equal(y, run_loop(args))
    once = {**args, "topk_ids": args["topk_ids"][:, :1], "topk_weights": args["topk_weights"][:, :1]}
    twice = {
        **args,
        "topk_ids": once["topk_ids"].expand(-1, 2),
        "topk_weights": once["topk_weights"].expand(-1, 2),
    }
    assert torch.equal(run(twice), 2 * run(once))


def test_weight_on_input() -> None:
    args = {**exact_operands(t=1), "weight_on_input": True}
    args["topk_weights"] = torch.tensor([0.5, 2.0, 1.0]).repeat(3)[:, None]
    y = run(args)
    assert torch.equal(y, run_loop(args))
    after = run({**args, "weight_on_input": False})
    assert torch.equal(y[2::3], after[2::3]), "a weight of 1 is the same on either side"
    assert not torch.equal(y[:2], after[:2])
    scaled = {**args, "x": args["x"] * args["topk_weights"], "topk_weights": torch.ones(9, 1)}
    assert torch.equal(y, run({**scaled, "weight_on_input": False}))
    padded = {**args, "topk_ids": torch.full((9, 1), -1), "topk_weights": torch.full((9, 1), torch.nan)}
    assert torch.equal(run(padded), torch.zeros_like(y))


def test_b2_is_inside_the_weighting() -> None:
    args = exact_operands(t=2)
    args["x"].zero_()
    args["b13"].zero_()
    ids, weights = args["topk_ids"], args["topk_weights"].double()
    assert torch.equal(run(args), torch.einsum("mt,mtn->mn", weights, args["b2"][ids].double()))


def test_only_routed_experts_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    args = operands(m=3, t=2, e=8)
    args["topk_ids"] = torch.tensor([[1, 6], [6, 1], [-1, 6]])
    seen: list[tuple[int, ...]] = []

    def counted(q: QuantTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        seen.append(q.shape)
        return dequantize(q, dtype)

    monkeypatch.setattr(microscale.reference, "dequantize", counted)
    moe(**args)
    assert sorted(seen) == sorted([args["w13"].shape[1:], args["w2"].shape[1:]] * 2), (
        "one at a time, and only two"
    )


def test_a_broken_expert_breaks_only_its_tokens() -> None:
    args = exact_operands(m=30, t=2)
    expected = run(args)
    args["w2"].scales[3] = 255
    args["b13"][1] = torch.nan
    hit = ((args["topk_ids"] == 3) | (args["topk_ids"] == 1)).any(dim=1)
    y = run(args)
    assert y[hit].isnan().all()
    assert torch.equal(y[~hit], expected[~hit])
