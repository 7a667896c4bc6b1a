"""The routers once more, in plain Python floats, row by row; and how far float32 may be from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from microscale.routing import ROUTERS

EPS = torch.finfo(torch.float32).eps
GROUPED = ("grouped_sigmoid_topk", "grouped_softmax_topk")
# Rows whose choice hangs on a difference that float32 may not see are left out of comparisons between two
# implementations. Scores are below 4 here and come from under ten roundings.
UNDECIDED = 40 * EPS


def call(router: str, logits: Tensor, top_k: int, **more: Any) -> tuple[Tensor, Tensor]:
    """A router with the least arguments that it takes."""
    if router in GROUPED:
        more = {"groups": 1, "topk_groups": 1, **more}
    return ROUTERS[router](logits, 1 if router == "sigmoid_top1_on_input" else top_k, **more)


def ordered(values: Sequence[float], count: int) -> tuple[list[int], float]:
    """The best `count`, ties by index, and the smallest gap that decided it."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    gaps = [values[a] - values[b] for a, b in itertools.pairwise(order[: count + 1])]
    return order[:count], min(gaps, default=math.inf)


def softmax(row: Sequence[float]) -> list[float]:
    top = max(row)
    e = [math.exp(v - top) for v in row]
    return [v / sum(e) for v in e]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


SCORES: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "softmax_topk": softmax,
    "grouped_softmax_topk": softmax,
    "sigmoid_topk": lambda row: [sigmoid(v) for v in row],
    "grouped_sigmoid_topk": lambda row: [sigmoid(v) for v in row],
    "sigmoid_top1_on_input": lambda row: [sigmoid(v) for v in row],
    "sqrt_softplus_topk": lambda row: [math.sqrt(math.log1p(math.exp(v))) for v in row],
}


def scalar(
    router: str,
    row: Sequence[float],
    top_k: int,
    *,
    bias: Sequence[float] | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    topk_groups: int = 1,
) -> tuple[list[int], list[float], float]:
    """One row: ids, weights, and the smallest gap on which the choice hung."""
    if router == "topk_softmax":
        ids, gap = ordered(row, top_k)
        return ids, softmax([row[i] for i in ids]), gap
    scores = SCORES[router](row)
    choice = [s + b for s, b in zip(scores, bias or [0.0] * len(row), strict=True)]
    gap = math.inf
    if router in GROUPED:
        size = len(row) // groups
        take = 2 if router == "grouped_sigmoid_topk" else 1
        of = [sum(sorted(choice[g * size : (g + 1) * size])[-take:]) for g in range(groups)]
        kept, _ = ordered(of, topk_groups)
        lost = [of[g] for g in range(groups) if g not in kept]
        gap = min(of[g] for g in kept) - max(lost, default=-math.inf)
        choice = [c if i // size in kept else -math.inf for i, c in enumerate(choice)]
    ids, gap_of_ids = ordered(choice, top_k)
    weights = [scores[i] for i in ids]
    total = sum(weights) if renormalize else 1.0
    return ids, [w / total * scale for w in weights], min(gap, gap_of_ids)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("softmax_topk", {"renormalize": True}),
    ("softmax_topk", {"renormalize": False}),
    ("topk_softmax", {}),
    ("sigmoid_topk", {"renormalize": True}),
    ("sigmoid_topk", {"renormalize": False, "bias": True}),
    ("sigmoid_topk", {"renormalize": True, "bias": True, "scale": 2.5}),
    (
        "grouped_sigmoid_topk",
        {"renormalize": True, "bias": True, "scale": 2.5, "groups": 8, "topk_groups": 4},
    ),
    ("grouped_sigmoid_topk", {"renormalize": False, "groups": 8, "topk_groups": 2}),
    ("grouped_sigmoid_topk", {"renormalize": True, "bias": True, "groups": 32, "topk_groups": 20}),
    ("grouped_sigmoid_topk", {"renormalize": True, "bias": True, "groups": 1, "topk_groups": 1}),
    ("grouped_softmax_topk", {"renormalize": False, "scale": 16.0, "groups": 8, "topk_groups": 3}),
    ("grouped_softmax_topk", {"renormalize": True, "groups": 4, "topk_groups": 2}),
    ("grouped_softmax_topk", {"renormalize": False, "groups": 1, "topk_groups": 1}),
    ("sigmoid_top1_on_input", {}),
    ("sqrt_softplus_topk", {"renormalize": True, "bias": True, "scale": 1.5}),
    ("sqrt_softplus_topk", {"renormalize": False}),
]


def bound(experts: int, top_k: int, logits: Tensor) -> float:
    """Relative error of a weight: a rounding for each term of two sums; |argument| of them from an
    exponential, whose argument, logits - max, is up to twice |logits|; and a few operations more.
    """
    return (experts + top_k + 2 * float(logits.abs().max()) + 8) * EPS
