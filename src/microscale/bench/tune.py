"""Finds the cuts of Hopper's kernels again: every candidate's numbers are checked, and the fastest of each row is kept.

The rows, numbers of tokens and of routes up to which one cut is used, stay those of `cuts.json`. A row is timed with
what lies in its upper half: all matrices of `gpu.LINEARS`, or the models of which a number of tokens falls into it. Of
a row of several cuts the sizes decide which is taken, so these are checked and timed, and stay.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from math import inf
from typing import Any

import torch
import triton
from torch import Tensor

from microscale.activations import GPT_OSS
from microscale.backends import triton as backend
from microscale.backends.triton import cuts, hopper, hopper_moe, nvrtc, tiles
from microscale.backends.triton.cuts import Cut, LinearRow
from microscale.backends.triton.fragments import Fragments
from microscale.bench import gpu
from microscale.errors import MicroscaleError
from microscale.formats import FORMATS, Format
from microscale.quant import quantize
from microscale.tolerance import linear_budget, moe_budget

# The format that stands for its group.
FORMAT_OF = {"4 bits": "mxfp4", "6 or 8 bits": "mxfp8_e4m3", "block": "fp8_block128"}
TOKENS = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)
# For rows of several cuts.
_BETWEEN = (256, 384, 512, 640, 768, 960, 1024, 1280, 2048, 3072, 4096, 8192)
# tiles, chunks, warps, stages, bulk, and programs; each with and without overlap where there is a choice.
_SHAPES = {
    8: (
        (1, 4, 4, 4, 0, 0),
        (1, 4, 4, 6, 0, 0),
        (1, 2, 4, 8, 0, 0),
        (2, 2, 4, 4, 0, 0),
        (2, 2, 4, 3, 0, 0),
        (2, 4, 4, 3, 0, 0),
    ),
    16: ((1, 4, 4, 4, 0, 0), (2, 2, 4, 4, 0, 0), (2, 2, 4, 3, 0, 0), (2, 1, 4, 6, 0, 0), (4, 1, 4, 4, 0, 0)),
    32: ((1, 4, 4, 4, 0, 0), (1, 2, 4, 6, 0, 0), (2, 1, 4, 6, 0, 0), (2, 1, 4, 5, 0, 0), (2, 2, 4, 3, 0, 0)),
    40: ((2, 1, 4, 3, 4, 0),),
    64: ((1, 4, 4, 4, 4, 0), (1, 2, 4, 4, 4, 0), (1, 2, 4, 5, 0, 0), (2, 1, 4, 6, 0, 0), (2, 1, 4, 5, 0, 0)),
    80: ((2, 1, 4, 3, 4, 0),),
    128: (
        (1, 4, 4, 3, 4, 0),
        (1, 2, 4, 4, 4, 0),
        (1, 2, 4, 3, 4, 0),
        (2, 1, 8, 3, 1, 2),
        (2, 1, 8, 3, 4, 2),
        (2, 1, 4, 3, 4, 0),
    ),
    192: ((2, 1, 8, 3, 4, 0), (2, 1, 8, 4, 4, 0)),
    256: ((2, 1, 8, 4, 1, 0), (2, 1, 8, 4, 4, 0)),
}

# Of a single token's experts, for w13 and w2 each: by `hopper_few`.
_FEW = ("m8t1c2w4s5f", "m8t1c2w4s8f", "m8t1c2w4s12f", "m8t2c2w8s6f", "m8t2c1w8s8fp1", "m8t1c2w4s6fp2")

# By `hopper_wide`, from so many tokens a matrix on.
_WIDE = (
    "m80t4c1w12s10x",
    "m128t4c1w12s8x",
    "m144t3c1w16s8x",
    "m144t4c1w12s8x",
    "m256t2c1w12s5x",
)
_WIDE_FROM = 48


def wide_candidates(fmt: Format, tokens: float) -> list[Cut]:
    """Cuts in CUDA C++ for about `tokens` tokens a matrix, where they can be compiled; with as many stages as fit."""
    if tokens < _WIDE_FROM or nvrtc.refuse() is not None:
        return []
    found = [Cut.parse(word).fitted(fmt, 1) for word in _WIDE]
    return [cut for cut in found if cut.block_m >= min(tokens, 256) / 2]


def candidates(fmt: Format, tokens: float, tail: bool) -> list[Cut]:
    """Cuts for up to `tokens` tokens a matrix: blocks of half as many to half as many again."""
    tokens = min(tokens, max(_SHAPES))
    sizes = [m for m in _SHAPES if tokens / 2 <= m <= max(tokens * 1.5, 8)]
    found = []
    for m in sizes:
        for (t, c, w, s, bulk, programs), overlap in itertools.product(_SHAPES[m], (False, True)):
            cut = Cut(m, t, c, w, s, overlap, tail and m >= 16, bulk, programs)
            if (overlap or not bulk) and cut.shared(fmt, 1) <= cuts.HOPPER_SHARED:
                found.append(cut)
    return found


class Checked:
    """Small problems of a format: whether a cut gives their float64 result, and the same bits as the first cut."""

    def __init__(self, fmt: Format) -> None:
        self.w = quantize(torch.randn(520, 1376, device="cuda"), fmt.name)
        self.x = torch.randn(300, 1376, device="cuda").bfloat16()
        self.w13 = quantize(torch.randn(8, 704, 416, device="cuda") / 20, fmt.name)
        self.w2 = quantize(torch.randn(8, 416, 352, device="cuda") / 20, fmt.name)
        self.tokens = torch.randn(300, 416, device="cuda").bfloat16()
        self.ids, self.weights = gpu.random_routes(300, 8, 4)
        self.linear_bits: Tensor | None = None
        self.moe_bits: Tensor | None = None
        self.said: dict[tuple[str, Cut], bool] = {}

    def linear(self, cut: Cut) -> bool:
        """Of a linear."""
        if ("linear", cut) not in self.said:
            w = backend.pack(self.w)
            assert isinstance(w, Fragments)
            y = hopper.linear(self.x, w, None, cut)
            self.linear_bits = y if self.linear_bits is None else self.linear_bits
            same = torch.equal(y, self.linear_bits)
            same &= torch.equal(hopper.linear(self.x[7:8], w, None, cut), y[7:8])
            self.said["linear", cut] = same and linear_budget(self.x, self.w).worst(y) <= 1
        return self.said["linear", cut]

    def moe(self, cut: Cut) -> bool:
        """Of experts, both kernels."""
        if ("moe", cut) not in self.said:
            w13, w2 = backend.pack(self.w13), backend.pack(self.w2)
            assert isinstance(w13, Fragments)
            assert isinstance(w2, Fragments)

            def run(rows: slice) -> Tensor:
                given = (self.tokens[rows], self.ids[rows], self.weights[rows])
                return hopper_moe.moe(*given, w13, w2, GPT_OSS, None, None, None, False, (cut, cut))

            y = run(slice(None))
            self.moe_bits = y if self.moe_bits is None else self.moe_bits
            same = torch.equal(y, self.moe_bits)
            same &= torch.equal(run(slice(7, 30)), y[7:30])
            if cut.block_m == 8:  # a single token's kernel is another one: it finds experts without a list
                same &= torch.equal(run(slice(7, 8)), y[7:8])
            budget = moe_budget(self.tokens, self.ids, self.weights, self.w13, self.w2, GPT_OSS)
            self.said["moe", cut] = same and budget.worst(y) <= 1
        return self.said["moe", cut]


def _time(calls: list[Callable[[], object]]) -> float:
    """Infinity for what does not compile."""
    try:
        return gpu.microseconds(calls, 25)
    except (triton.errors.TritonError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        return inf


def _experts(given: tuple[Any, ...], biases: tuple[Any, Any], pair: tuple[Cut, Cut]) -> Tensor:
    x, ids, weights, w13, w2, activation = given
    return hopper_moe.moe(x, ids, weights, w13, w2, activation, *biases, None, False, pair)


def _best(times: dict[Any, dict[str, float]]) -> Any:
    """What loses least against the fastest of each cell, in the mean of logarithms."""
    cells = {cell for found in times.values() for cell in found}
    least = {cell: min(found[cell] for found in times.values()) for cell in cells}

    def loss(key: Any) -> float:
        product = 1.0
        for cell in cells:
            product *= times[key][cell] / least[cell]
        return product

    return min(times, key=loss)


def timed_with(rows: tuple[LinearRow, ...], row: LinearRow) -> tuple[int, list[str]]:
    """Tokens, and those of `gpu.LINEARS` for which these rows take this one.

    Raises:
        MicroscaleError: there are none.
    """
    m = int(min(row.tokens, 2048))
    while m <= 1 << 14:
        found = [
            name
            for name, (n, _) in gpu.LINEARS.items()
            if next(r for r in rows if r.holds(m, n // 64)) is row
        ]
        if found:
            return m, found
        m *= 2
    raise MicroscaleError(f"no matrix of {list(gpu.LINEARS)} takes the row of up to {row.tokens} tokens")


def _entry(row: LinearRow) -> dict[str, Any]:
    """As `cuts.json` has a row, but for the times."""
    entry: dict[str, Any] = {"tokens": None if row.tokens == inf else row.tokens}
    if row.tiles:
        entry["tiles"] = row.tiles
    entry["cut"] = str(row.cut)
    if row.others:
        entry["or"] = [str(cut) for cut in row.others]
    return entry


def _times_of(
    row: LinearRow, rows: tuple[LinearRow, ...], weights: dict[str, list[Any]], checked: Checked
) -> Iterator[tuple[str, float]]:
    """What linears take with a row of several cuts, for numbers of tokens that it holds for.

    Raises:
        MicroscaleError: a cut's numbers are wrong.
    """
    wrong = [str(cut) for cut in (row.cut, *row.others) if not checked.linear(cut)]
    if wrong:
        raise MicroscaleError(f"wrong numbers with the cuts {', '.join(wrong)} of cuts.json")
    for m, (what, (n, k)) in itertools.product(_BETWEEN, gpu.LINEARS.items()):
        if next(r for r in rows if r.holds(m, n // 64)) is row:
            x, cut = torch.randn(m, k, device="cuda").bfloat16(), row.fit(m, n // 64)
            yield (
                f"{what} M={m}",
                round(_time([partial(hopper.linear, x, w, None, cut) for w in weights[what][:4]]), 1),
            )


def tune_linear(name: str, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The rows of linears, as `cuts.json` has them."""
    fmt = FORMATS[FORMAT_OF[name]]
    checked = Checked(fmt)
    weights: dict[str, list[Any]] = {
        what: [gpu.random_weights(fmt.name, n, k) for _ in range(max(4, int(3.5e8 / (n * k))))]
        for what, (n, k) in gpu.LINEARS.items()
    }
    rows = cuts.table()[name][0]
    for row in rows:
        if row.others:
            yield _entry(row) | {"us": dict(_times_of(row, rows, weights, checked))}
            continue
        m, of_row = timed_with(rows, row)
        times: dict[Cut, dict[str, float]] = {}
        for cut in dict.fromkeys([row.cut, *candidates(fmt, m, tail=False), *wide_candidates(fmt, m)]):
            found = {}
            for what in of_row:
                x = torch.randn(m, gpu.LINEARS[what][1], device="cuda").bfloat16()
                used = weights[what] if m <= 128 else weights[what][:4]
                found[f"{what} M={m}"] = _time([partial(hopper.linear, x, w, None, cut) for w in used])
            if max(found.values()) < inf and checked.linear(cut):
                times[cut] = found
        best = _best(times)
        say(f"{name}, linear, to {row.tokens} tokens: {best}, before {row.cut}")
        yield _entry(row) | {"cut": str(best), "us": {k: round(v, 1) for k, v in times[best].items()}}


def tune_moe(name: str, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The rows of experts."""
    fmt = FORMATS[FORMAT_OF[name]]
    checked = Checked(fmt)
    layers = {what: gpu.moe_layers(model, fmt.name, 1) for what, model in gpu.MODELS.items()}
    rows = cuts.table()[name][1]
    for i, row in enumerate(rows):
        times: dict[tuple[Cut, Cut], dict[str, float]] = {}
        for what, model in gpu.MODELS.items():
            for tokens in TOKENS:
                pair = (fmt, fmt)
                if cuts.moe_cuts(pair, tokens, model.top_k, model.experts, 1) != (row.first, row.second):
                    continue
                routes = tokens * model.top_k
                each = routes / min(model.experts, routes) if tokens > 1 else 1
                cell = gpu.moe_cell(model, layers[what], tokens)
                apart = model.activation.apart
                size = max(each, 8)
                tried = [
                    c for c in candidates(fmt, 2 ** (int(size) - 1).bit_length(), tail=True) if checked.moe(c)
                ]
                pairs = [(row.first, row.second)]
                pairs += [(c, c) for c in tried if c.tiles > 1 or not apart]
                pairs += [(c, c) for c in wide_candidates(fmt, size) if checked.moe(c)]
                if tokens == 1 and fmt.scale != "f32":
                    few = [cut for cut in map(Cut.parse, _FEW) if checked.moe(cut)]
                    pairs += itertools.product(few, few)
                for first, second in dict.fromkeys(pairs):
                    both = (first, second)
                    taken = _time([partial(_experts, g, cell.biases, both) for g in cell.given])
                    if taken < inf:
                        times.setdefault(both, {})[f"{what} M={tokens}"] = taken
        entry = {
            "routes": None if row.routes == inf else row.routes,
            "each": None if row.each == inf else row.each,
        }
        # Only pairs that ran in every cell of the row can be compared.
        most = max((len(found) for found in times.values()), default=0)
        whole = {key: found for key, found in times.items() if len(found) == most}
        first, second = _best(whole) if whole else (row.first, row.second)
        say(
            f"{name}, experts, row {i + 1} of {len(rows)}: {first}, {second}, before {row.first}, {row.second}"
        )
        us = {k: round(v, 1) for k, v in whole.get((first, second), {}).items()}
        yield entry | {"w13": str(first), "w2": str(second), "us": us}


def tune(groups: list[str], ops: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """What `cuts.json` should say on this GPU; groups and kinds of layer that are left out stay as they are.

    Raises:
        MicroscaleError: this GPU does not run Hopper's kernels.
    """
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not tiles.target(device).hopper:
        raise MicroscaleError("bench tune needs a Hopper GPU (sm_90) and triton 3.6, whose cuts it measures")
    text = (resources.files("microscale.backends.triton") / "cuts.json").read_text("utf-8")
    document: dict[str, Any] = json.loads(text)
    document["measured"] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "formats": FORMAT_OF,
    }
    with torch.no_grad():
        for name in groups:
            table = document["tables"]["sm_90"][name]
            if "linear" in ops:
                table["linear"] = list(tune_linear(name, say))
                torch.cuda.empty_cache()
            if "moe" in ops:
                table["moe"] = list(tune_moe(name, say))
                torch.cuda.empty_cache()
    return document
