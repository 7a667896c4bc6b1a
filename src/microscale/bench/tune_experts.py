"""Finds the cuts of Hopper's experts again.

A row is timed with the models of which a number of tokens falls into it. Of a row of several pairs the number of routes
decides which is taken: these stay, checked and timed anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from typing import Any

from torch import Tensor

from microscale.backends.triton import cuts, hopper_experts
from microscale.backends.triton.cuts import Cut, MoeRow
from microscale.bench import gpu
from microscale.bench.tune_candidates import Checked, candidates, least_loss, timed, wide_candidates
from microscale.errors import MicroscaleError
from microscale.formats import Format

TOKENS = (1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)

# Of a single token's experts, for w13 and w2 each: by `hopper_few`.
_FEW = ("m8t1c2w4s5f", "m8t1c2w4s8f", "m8t1c2w4s12f", "m8t2c2w8s6f", "m8t2c1w8s8fp1", "m8t1c2w4s6fp2")

# Of few tokens, by `hopper_rings`, for w13 and w2.
_RINGS = (
    ("m8t2c4w8s3r", "m8t2c6w8s3r"),
    ("m8t2c5w8s3r", "m8t2c5w8s3r"),
    ("m8t2c8w8s3r", "m8t2c12w8s3r"),
    ("m8t2c9w8s2r", "m8t2c9w8s2r"),
    ("m8t2c9w8s4r", "m8t2c9w8s4r"),
    ("m8t3c9w12s2r", "m8t3c9w12s2r"),
    ("m8t4c4w8s2r", "m8t4c4w8s2r"),
    ("m8t4c4w8s3r", "m8t4c4w8s3r"),
    ("m8t4c8w8s2r", "m8t4c6w8s2r"),
    ("m8t6c4w12s2r", "m8t6c4w12s2r"),
    ("m16t4c4w8s2r", "m16t4c4w8s2r"),
    ("m16t4c4w8s3r", "m16t4c4w8s3r"),
    ("m16t4c5w8s2r", "m16t4c5w8s2r"),
    ("m16t6c4w12s3r", "m16t6c4w12s3r"),
    ("m16t6c5w12s2r", "m16t6c5w12s2r"),
    ("m24t4c3w8s3r", "m24t4c3w8s3r"),
    ("m24t4c4w8s2r", "m24t4c4w8s2r"),
    ("m24t4c5w8s2r", "m24t4c5w8s2r"),
    ("m24t6c4w12s3r", "m24t6c4w12s3r"),
    ("m24t6c5w12s2r", "m24t6c5w12s2r"),
)


def _experts(given: tuple[Any, ...], biases: tuple[Any, Any], pair: tuple[Cut, Cut]) -> Tensor:
    x, ids, weights, w13, w2, activation = given
    return hopper_experts.moe(x, ids, weights, w13, w2, activation, *biases, None, False, pair)


def _pairs(
    row: MoeRow, fmt: Format, model: gpu.Experts, tokens: int, each: float, checked: Checked
) -> list[tuple[Cut, Cut]]:
    """What may be the row's pair for these experts; of a row of several, the one that it has for them."""
    if len(row.pairs) > 1:
        return [row.fit(each)]
    if row.rings:
        other = cuts.moe_cuts((fmt, fmt), tokens, model.top_k, model.experts, model.inner, 1, rings=False)
        rings = [(Cut.parse(first), Cut.parse(second)) for first, second in _RINGS]
        large = [pair for pair in rings if pair[0].block_m >= each]
        right = [pair for pair in large if checked.moe(pair[0]) and checked.moe(pair[1])]
        return list(dict.fromkeys([other, *row.pairs, *right]))
    apart = model.activation.apart
    size = max(each, 8)
    tried = [c for c in candidates(fmt, 2 ** (int(size) - 1).bit_length(), tail=True) if checked.moe(c)]
    found = [*row.pairs]
    for first, second in itertools.product(tried, tried):
        if (first.block_m, first.tail) == (second.block_m, second.tail) and (first.tiles > 1 or not apart):
            found.append((first, second))
    found += [(c, c) for c in wide_candidates(fmt, size, experts=True) if checked.moe(c)]
    if tokens == 1 and fmt.scale != "f32":
        few = [cut for cut in map(Cut.parse, _FEW) if checked.moe(cut)]
        found += itertools.product(few, few)
    return list(dict.fromkeys(found))


def tune_moe(name: str, fmt: Format, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The rows of experts, as `cuts.json` has them, by a format that stands for the group `name`.

    Raises:
        MicroscaleError: a cut of a row of several has wrong numbers.
    """
    checked = Checked(fmt)
    layers = {what: gpu.moe_layers(model, fmt.name, 1) for what, model in gpu.MODELS.items()}
    rows = cuts.table()[name][1]
    for i, row in enumerate(rows):
        wrong = [str(cut) for cut, _ in row.pairs if not checked.moe(cut)] if len(row.pairs) > 1 else []
        if wrong:
            raise MicroscaleError(f"wrong numbers with the cuts {', '.join(wrong)} of cuts.json")
        times: dict[tuple[Cut, Cut], dict[str, float]] = {}
        for (what, model), tokens in itertools.product(gpu.MODELS.items(), TOKENS):
            routes, each = cuts.shares(tokens, model.top_k, model.experts)
            if next(r for r in rows if r.holds(tokens, routes, each, model.inner)) is not row:
                continue
            say(f"{name}, experts, row {i + 1} of {len(rows)}: {what} with {tokens} tokens")
            cell = gpu.moe_cell(model, layers[what], tokens)
            for both in _pairs(row, fmt, model, tokens, each, checked):
                taken = timed([partial(_experts, g, cell.biases, both) for g in cell.given])
                if taken < inf:
                    times.setdefault(both, {})[f"{what} M={tokens}"] = taken
        yield moe_entry(row, times)
        say(f"{name}, experts, row {i + 1} of {len(rows)}: {len(times)} pairs of cuts timed")


def moe_entry(row: MoeRow, times: dict[tuple[Cut, Cut], dict[str, float]]) -> dict[str, Any]:
    """The row as `cuts.json` has it: with the best pair, or all of them where there are several.

    Args:
        times: what cells took with each pair, in microseconds.
    """
    entry: dict[str, Any] = {
        "routes": None if row.routes == inf else row.routes,
        "each": None if row.each == inf else row.each,
    }
    if row.columns < inf:
        entry["columns"] = row.columns
    if len(row.pairs) > 1:
        pairs, found = row.pairs, {k: v for of in times.values() for k, v in of.items()}
    else:
        # Only pairs that ran in every cell of the row can be compared.
        most = max((len(of) for of in times.values()), default=0)
        whole = {pair: of for pair, of in times.items() if len(of) == most}
        pairs = (least_loss(whole),) if whole else row.pairs
        found = whole.get(pairs[0], {})
    us = {k: round(v, 1) for k, v in found.items()}
    return entry | {"pairs": [[str(first), str(second)] for first, second in pairs], "us": us}
