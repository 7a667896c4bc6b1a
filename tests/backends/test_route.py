"""The core's routes against their slow twins in `microscale.routing`, equal logits and NaN among them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from microscale import routing

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, experts, top_k", [(0, 4, 2), (1, 1, 1), (1, 32, 4), (7, 33, 33), (8, 512, 10)])
@pytest.mark.parametrize("coarse", [False, True])
def test_routes_are_those_of_routing(
    cpu: Any, level: str, dtype: torch.dtype, m: int, experts: int, top_k: int, coarse: bool
) -> None:
    logits = torch.randn(m, experts).mul(3).to(dtype)
    if coarse:  # many are equal
        logits = logits.round()
    ways = (("topk_softmax", True), ("softmax_topk", True), ("softmax_topk", False))
    for (router, renormalize), rounded in itertools.product(ways, (None, *DTYPES)):
        weights, ids = cpu.cpu_core.route(logits, top_k, router, renormalize, rounded)
        options = {"renormalize": renormalize} if router == "softmax_topk" else {}
        wanted_ids, wanted = routing.ROUTERS[router](logits, top_k, **options)
        assert torch.equal(ids, wanted_ids)
        # Exponentials of two kinds, their sums, and then rounding.
        shares = torch.finfo(rounded or dtype)
        relative = (experts + 8) * 2.0**-23 + shares.eps / 2
        least = shares.smallest_normal * shares.eps
        assert torch.equal(weights, weights.to(rounded or dtype).float())
        assert ((weights - wanted).abs() <= relative * wanted + least).all()


def test_a_nan_is_chosen_and_makes_the_weights_nan(cpu: Any, level: str) -> None:
    logits = torch.tensor([[1.0, float("nan"), 3.0, float("nan"), float("inf")]])
    for router in cpu.cpu_core.ROUTERS:
        weights, ids = cpu.cpu_core.route(logits, 3, router)
        wanted, _ = routing.ROUTERS[router](logits, 3)
        if router == "topk_softmax":
            assert torch.equal(ids, wanted)
        assert ids.min() >= 0
        assert ids.max() < 5
        assert weights.isnan().any()
