"""Routers against scalar Python, transformers' own modules, and the promises of the module's docstring."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microscale.errors import BackendError
from microscale.routing import ROUTERS
from scalar_routers import (
    CASES,
    EPS,
    GROUPED,
    UNDECIDED,
    bound,
    call,
    scalar,
)


@pytest.mark.parametrize("router, options", CASES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_against_scalar_python(router: str, options: dict[str, Any], top_k: int) -> None:
    experts, rows = 32, 64
    top_k = 1 if router == "sigmoid_top1_on_input" else top_k
    options = dict(options)
    bias = torch.randn(experts) * 0.3 if options.pop("bias", False) else None
    logits = torch.randn(rows, experts) * 2
    given_options = options if bias is None else {**options, "bias": bias}
    ids, weights = ROUTERS[router](logits, top_k, **given_options)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert ids.shape == weights.shape == (rows, top_k)
    if bias is not None:
        options["bias"] = bias.tolist()
    decided = 0
    for row, found, found_weights in zip(logits.tolist(), ids.tolist(), weights.tolist(), strict=True):
        expected, expected_weights, gap = scalar(router, row, top_k, **options)
        if gap <= UNDECIDED:
            continue
        decided += 1
        assert found == expected
        for a, b in zip(found_weights, expected_weights, strict=True):
            assert abs(a - b) <= bound(experts, top_k, logits) * b
    assert decided > rows / 2


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("experts", [7, 40, 600])  # torch sorts short, middling and long rows differently
def test_ties_go_to_the_lower_index(router: str, experts: int) -> None:
    # Both values have exact scores under every rule: no ulp between two code paths of exp can break a tie.
    logits = torch.where(torch.rand(50, experts) < 0.1, 25.0, -200.0)
    top_k = min(experts, 8)
    ids, _ = call(router, logits, top_k)
    for row, found in zip(logits.tolist(), ids.tolist(), strict=True):
        assert found == sorted(range(experts), key=lambda i: (-row[i], i))[: len(found)]


def test_saturated_scores_are_ties() -> None:
    logits = torch.tensor([[20.0, 90.0, 30.0, 80.0]])  # each sigmoid is 1.0 in float32
    assert ROUTERS["sigmoid_topk"](logits, 3)[0].tolist() == [[0, 1, 2]]
    assert ROUTERS["sigmoid_top1_on_input"](logits)[0].tolist() == [[1]], "Llama 4 ranks the logits"


@pytest.mark.parametrize("router", GROUPED)
def test_tied_groups_go_to_the_lower_index(router: str) -> None:
    logits = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).repeat(3, 1)
    assert ROUTERS[router](logits, 3, groups=4, topk_groups=2)[0].tolist() == [[2, 3, 4]] * 3


def test_groups_hide_better_experts() -> None:
    """A lone best expert loses with its group by the sum of two, and wins by the maximum."""
    logits = torch.tensor([[3.0, -9.0, 1.5, 1.5, -9.0, -9.0]])
    assert ROUTERS["grouped_sigmoid_topk"](logits, 2, groups=3, topk_groups=1)[0].tolist() == [[2, 3]]
    assert ROUTERS["grouped_softmax_topk"](logits, 2, groups=3, topk_groups=1)[0].tolist() == [[0, 1]]


def test_dropped_groups_lose_to_underflow() -> None:
    """A kept expert of score 0 is still chosen before any of a dropped group."""
    logits = torch.tensor([[-1.0, -1.0, 0.0, -200.0]])
    ids, weights = ROUTERS["grouped_softmax_topk"](logits, 2, groups=2, topk_groups=1)
    assert ids.tolist() == [[2, 3]]
    assert weights[0, 1] == 0


@pytest.mark.parametrize("router", ["sigmoid_topk", "grouped_sigmoid_topk", "sqrt_softplus_topk"])
def test_the_bias_chooses_and_never_weighs(router: str) -> None:
    logits = torch.randn(9, 8)
    bias = torch.zeros(8)
    bias[[5, 2]] = torch.tensor([50.0, 40.0])
    ids, weights = call(router, logits, 2, bias=bias, renormalize=False)
    assert ids.tolist() == [[5, 2]] * 9
    _, unbiased = call(router, logits, 8, renormalize=False)
    order = call(router, logits, 8, renormalize=False)[0]
    assert torch.equal(weights, torch.zeros(9, 8).scatter_(1, order, unbiased)[:, [5, 2]])


@pytest.mark.parametrize("router", ["sigmoid_topk", "grouped_sigmoid_topk", "sqrt_softplus_topk"])
def test_all_scores_zero(router: str) -> None:
    _, weights = call(router, torch.full((2, 4), -1000.0), 2, renormalize=True)
    assert torch.equal(weights, torch.zeros(2, 2)), "0 / (0 + 1e-20), not NaN"


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_nan_comes_through_in_its_row_only(router: str, renormalize: bool) -> None:
    takes = router not in ("topk_softmax", "sigmoid_top1_on_input")
    options: dict[str, Any] = {"renormalize": renormalize} if takes else {}
    if router in GROUPED:
        options |= {"groups": 4, "topk_groups": 2}
    logits = torch.randn(6, 12)
    clean_ids, clean = call(router, logits, 3, **options)
    dirty = logits.clone()
    dirty[2, 7] = math.nan
    dirty[4] = math.nan
    ids, weights = call(router, dirty, 3, **options)
    assert weights.isnan().any(dim=1).tolist() == [False, False, True, False, True, False]
    if "softmax" not in router:  # a softmax over all makes every score NaN: any expert will do
        assert 7 in ids[2].tolist()
    if renormalize or "softmax" in router:
        assert weights[[2, 4]].isnan().all()
    assert ((ids >= 0) & (ids < 12)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    others = [0, 1, 3, 5]
    assert torch.equal(ids[others], clean_ids[others])
    assert torch.equal(weights[others], clean[others])


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_empty(router: str, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 8).to(dtype)
    before = logits.clone()
    ids, weights = call(router, logits, 2)
    assert torch.equal(logits, before)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    expected_ids, expected = call(router, logits.float(), 2)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected)
    ids, weights = call(router, logits[:0], 2)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert ids.shape == weights.shape == (0, 1 if router == "sigmoid_top1_on_input" else 2)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(ROUTERS)), st.integers(1, 40), st.integers(0, 9), st.data())
def test_invariants(router: str, experts: int, rows: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    logits = torch.randn(
        rows, experts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    )
    ids, weights = call(router, logits, top_k)
    assert ((ids >= 0) & (ids < experts)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert (weights >= 0).all()
    # softplus and softmax keep the order of the logits, and no bias is given: best first.
    assert (weights[:, 1:] <= weights[:, :-1] * (1 + 4 * EPS)).all()
    if router not in ("grouped_softmax_topk", "sigmoid_top1_on_input"):
        assert ((weights.sum(1) - 1).abs() <= (top_k + 2) * EPS).all()


def test_softmax_orders_commute() -> None:
    """Mixtral's rule is gpt-oss's, but for rounding."""
    logits = torch.randn(100, 16) * 3
    ids, weights = ROUTERS["softmax_topk"](logits, 4)
    other_ids, other = ROUTERS["topk_softmax"](logits, 4)
    decided = torch.tensor([scalar("softmax_topk", row, 4)[2] > UNDECIDED for row in logits.tolist()])
    assert decided.sum() > 50
    assert torch.equal(ids[decided], other_ids[decided])
    assert ((weights - other).abs() <= 2 * bound(16, 4, logits) * other)[decided].all()


@pytest.mark.parametrize("router", ROUTERS)
def test_bad_logits(router: str) -> None:
    with pytest.raises(BackendError, match=r"\[M, E\], found torch.float32 \(8,\)"):
        call(router, torch.zeros(8), 2)
    with pytest.raises(BackendError, match=r"\[M, E\], found torch.int64 \(3, 8\)"):
        call(router, torch.zeros(3, 8, dtype=torch.int64), 2)


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"sigmoid_top1_on_input"}))
@pytest.mark.parametrize("top_k", [0, -1, 9])
def test_bad_top_k(router: str, top_k: int) -> None:
    with pytest.raises(BackendError, match=rf"top_k: expected 1 to E = 8, found {top_k}$"):
        call(router, torch.zeros(3, 8), top_k)


def test_only_one_on_input() -> None:
    with pytest.raises(BackendError, match="expected top_k = 1, found 2"):
        ROUTERS["sigmoid_top1_on_input"](torch.zeros(3, 8), 2)


@pytest.mark.parametrize("router", ["sigmoid_topk", "grouped_sigmoid_topk", "sqrt_softplus_topk"])
def test_bad_bias(router: str) -> None:
    with pytest.raises(BackendError, match=r"bias: expected \(8,\), found \(1,\)"):
        call(router, torch.zeros(3, 8), 2, bias=torch.zeros(1))


@pytest.mark.parametrize("router", GROUPED)
@pytest.mark.parametrize("groups, topk_groups", [(3, 1), (0, 0), (4, 5), (4, 0)])
def test_bad_groups(router: str, groups: int, topk_groups: int) -> None:
    message = f"cannot choose {topk_groups} of {groups} groups of E = 8 experts"
    with pytest.raises(BackendError, match=message):
        ROUTERS[router](torch.zeros(3, 8), 1, groups=groups, topk_groups=topk_groups)


@pytest.mark.parametrize("router", GROUPED)
def test_groups_too_small_for_top_k(router: str) -> None:
    with pytest.raises(BackendError, match="2 groups of 2 experts do not have 5"):
        ROUTERS[router](torch.zeros(3, 8), 5, groups=4, topk_groups=2)
