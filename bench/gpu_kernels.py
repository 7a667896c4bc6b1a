"""How fast the Triton kernels are on this CUDA GPU.

    python bench/gpu_kernels.py [--formats all] [--peers humming] [--json FILE]

Bfloat16 activations; experts with their routing, and linears. Prints a table in Markdown. First a small problem of each
kind is compared with float64. Calls are captured in a CUDA graph, with other routes and, where weights are small, other
weights each time, so that no cache holds them. Microseconds are the median of replays.

With `--cuts` Hopper's kernels are timed with these cuts, too, beside what the tables take, and not at all if they give
other bits; `cuts.Cut` says what a word of them means. Experts have a cut for w13 and w2, or two with a + between.

With `--act a8` and the like layers whose activations are stored so are timed, too, by this backend's kernels, which are
not what linears of block FP8 take on Hopper (`microscale explain` says what that is).

With `--peers humming` the package humming-kernels multiplies the same weights in the same run: its graph and ours are
replayed in turn, and its results are compared with ours. `peers/humming_kernels.py` says how it is called.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from microscale.backends import triton as backend
from microscale.backends.triton.cuts import Cut
from microscale.backends.triton_rules import refuse_pair
from microscale.bench.gpu import (
    LARGE,
    LINEARS,
    MODELS,
    MoeCell,
    Times,
    ceilings,
    floor,
    interleaved,
    moe_cell,
    moe_layers,
    random_routes,
    random_weights,
)
from microscale.formats import FORMATS, Format, activation_format
from microscale.quant import quantize
from microscale.tolerance import linear_budget, moe_budget
from peers import humming_kernels

TOKENS = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)
EXPERTS = MODELS | LARGE
# By the word of activations, their format and the layers packed for them.
Stored = dict[str, tuple[Format, list[Any]]]


def check(name: str) -> None:
    """Each model's activation on few and small experts, and a linear, against float64; a graph against eager calls."""
    for what, model in MODELS.items():
        for tokens in (1, 40, 300):
            x = torch.randn(tokens, 384, device="cuda").bfloat16()
            ids, weights = random_routes(tokens, 8, model.top_k)
            w13 = quantize(torch.randn(8, model.activation.rows(320), 384, device="cuda") / 20, name)
            w2 = quantize(torch.randn(8, 384, 320, device="cuda") / 20, name)
            packed = backend.pack(w13), backend.pack(w2)
            y = backend.moe(x, ids, weights, *packed, model.activation)
            worst = moe_budget(x, ids, weights, w13, w2, model.activation).worst(y)
            assert worst <= 1, (
                f"{name}, experts of {what}, {tokens} tokens: {worst:.3g} times the permitted error"
            )
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                again = backend.moe(x, ids, weights, *packed, model.activation)
            again.fill_(float("nan"))
            graph.replay()
            assert torch.equal(again, y), f"{name}, experts of {what}: a graph gives other bits"
    for tokens in (1, 20, 40, 100, 200, 300):
        x = torch.randn(tokens, 1344, device="cuda").bfloat16()
        w = quantize(torch.randn(1000, 1344, device="cuda"), name)
        y = backend.linear(x, backend.pack(w))
        worst = linear_budget(x, w, None).worst(y)
        assert worst <= 1, f"{name}, linear, {tokens} tokens: {worst:.3g} times the permitted error"
        assert torch.equal(y, backend.linear(x, backend.pack(w))), (
            f"{name}, linear: a second run gives other bits"
        )


def time_linear(
    name: str,
    tokens: int,
    weights: list[Any],
    peaks: tuple[float, float],
    peer: list[Any],
    cuts: list[tuple[Cut, Cut]],
    stored: Stored,
) -> dict[str, Any]:
    """One cell, what torch takes for the same product of bfloat16, and what a peer does for the same weights."""
    n, k = LINEARS[name]
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    plain = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(4)]
    read = n * k * weights[0].format.bits_per_weight / 8 + 2 * tokens * (n + k)
    kinds: dict[str, Any] = {
        "us": [partial(backend.linear, x, w) for w in weights],
        "bf16": [partial(torch.nn.functional.linear, x, p) for p in plain],
    }
    for word, (act, packed) in stored.items():
        kinds[word] = [partial(backend.linear, x, w, act=act) for w in packed]
    for cut, _ in cuts:
        from microscale.backends.triton import hopper

        kinds[str(cut)] = [partial(hopper.linear, x, w, None, cut) for w in weights]
        same(f"{name}, {tokens} tokens, {cut}", kinds["us"][0](), kinds[str(cut)][0]())
    if peer:
        kinds["humming"] = [partial(humming_kernels.linear, x, w) for w in peer]
        agree(f"{name}, {tokens} tokens", kinds["us"][0](), kinds["humming"][0]())
    # Equally many calls of each: a graph takes some microseconds to begin.
    calls = 16 if tokens <= 2048 else 4
    in_turn = {kind: [given[i % len(given)] for i in range(calls)] for kind, given in kinds.items()}
    return cell(interleaved(in_turn), floor(read, 2.0 * tokens * n * k, peaks))


def time_experts(
    made: MoeCell,
    layers: list[Any],
    peaks: tuple[float, float],
    peer: list[Any],
    cuts: list[tuple[Cut, Cut]],
    stored: Stored,
) -> dict[str, Any]:
    """One cell, and what a peer takes for the same weights and routes."""
    b13, b2 = made.biases
    kinds: dict[str, Any] = {"us": [partial(backend.moe, *g, b13=b13, b2=b2) for g in made.given]}
    for word, (act, packed) in stored.items():
        kinds[word] = [
            partial(backend.moe, *g[:3], *packed[i % len(packed)], g[5], b13=b13, b2=b2, act=act)
            for i, g in enumerate(made.given)
        ]
    for pair in cuts:
        from microscale.backends.triton import hopper_experts

        rest, name = (b13, b2, None, False, pair), "+".join(dict.fromkeys(map(str, pair)))
        kinds[name] = [partial(hopper_experts.moe, *g, *rest) for g in made.given]
        same(f"experts, {name}", kinds["us"][0](), kinds[name][0]())
    for way in humming_kernels.ways(made.given[0][0].shape[0]) if peer else ():
        kinds[f"humming {way}"] = [
            humming_kernels.experts(way, *g[:3], *peer[i % len(layers)], g[5])
            for i, g in enumerate(made.given)
        ]
        agree(f"experts, {way}", kinds["us"][0](), kinds[f"humming {way}"][0]())
    return cell(interleaved(kinds), floor(made.read, made.operations, peaks))


def agree(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """A peer that computes something else is not timed. It rounds more often than we do."""
    error = ((theirs.double() - ours.double()).norm() / ours.double().norm()).item()
    assert error <= 1e-2, f"{what}: humming's result is {error:.3g} away from ours"


def same(what: str, ours: torch.Tensor, others: torch.Tensor) -> None:
    """A cut decides the speed only."""
    assert torch.equal(ours, others), f"{what}: other bits than with the tables' cuts"


def cell(times: dict[str, Times], least: float) -> dict[str, Any]:
    """A row of the table: medians, and quartiles beside them."""
    row: dict[str, Any] = {"floor": least} | {name: t.median for name, t in times.items()}
    row["quartiles"] = {name: (t.low, t.high) for name, t in times.items()}
    theirs = {name: t.median for name, t in times.items() if name.startswith("humming")}
    if theirs:
        row["peer"] = min(theirs, key=theirs.__getitem__)
    return row


def made_layers(what: str, name: str, peer: bool) -> tuple[list[Any], list[Any]]:
    """Layers of a model or a linear in a format, and of linears a peer's copies."""
    if what in EXPERTS:
        return moe_layers(EXPERTS[what], name, 2 if what in ("gpt-oss-20b", "qwen3-30b-a3b") else 1), []
    n, k = LINEARS[what]
    bytes_each = n * k * FORMATS[name].bits_per_weight / 8
    layers = [random_weights(name, n, k) for _ in range(max(4, int(3.5e8 / bytes_each)))]
    return layers, [humming_kernels.pack(backend.unpack(w)) for w in layers] if peer else []


def stored_layers(layers: list[Any], name: str, words: list[str]) -> Stored:
    """By the words of activations that there are kernels for beside this format: their format, and the layers."""
    found: Stored = {}
    for word in words:
        act = activation_format(name, word)
        if act is None or refuse_pair(name, act.name) is not None:
            print(f"{word} is not timed beside {name}: {act and refuse_pair(name, act.name)}\n")
            continue
        found[word] = (
            act,
            [
                tuple(backend.pack_for(backend.unpack(w), act) for w in layer)
                if isinstance(layer, tuple)
                else backend.pack_for(backend.unpack(layer), act)
                for layer in layers
            ],
        )
    return found


def pack_experts(layer: tuple[Any, Any], biases: tuple[Any, Any]) -> tuple[Any, Any]:
    """A peer's w13 and w2, which hold the biases, too."""
    w13, w2 = (humming_kernels.pack(backend.unpack(w), b) for w, b in zip(layer, biases, strict=True))
    return w13, w2


def compile_experts(peer: tuple[Any, Any], top_k: int, tokens: list[int]) -> None:
    """A peer's kernels for all cells of a model."""
    ways = [(humming_kernels.WAYS[way], m * top_k) for m in tokens for way in humming_kernels.ways(m)]
    humming_kernels.compile_for([*peer], ways)


def line(row: dict[str, Any]) -> str:
    """Of the table, in Markdown."""
    bf16 = f"{row['bf16']:.1f}" if "bf16" in row else ""
    peer, times = "", ""
    if "peer" in row:
        way = row["peer"].removeprefix("humming").strip()
        peer, times = f"{row[row['peer']]:.1f} {way}".strip(), f"{row[row['peer']] / row['us']:.2f}"
    part = row["floor"] / row["us"]
    head = f"| {row['format']} | {row['what']} | {row['tokens']} | {row['us']:.1f} | {part:.2f} "
    others = [n for n in row["quartiles"] if n not in ("us", "bf16") and not n.startswith("humming")]
    beside = ", ".join(f"{name} {row[name]:.1f}" for name in others)
    return f"{head}| {bf16} | {peer} | {times} |" + (f" {beside} |" if beside else "")


def _pair(words: str) -> tuple[Cut, Cut]:
    """One cut, or two with a + between, for w13 and w2."""
    first, _, second = words.partition("+")
    return Cut.parse(first), Cut.parse(second or first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*MODELS, *LINEARS], choices=[*EXPERTS, *LINEARS])
    parser.add_argument("--formats", nargs="*", default=["mxfp4"], choices=[*FORMATS, "all"])
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--act", nargs="*", default=[], help="time activations stored so, too: a8, ...")
    parser.add_argument("--cuts", nargs="*", default=[], type=_pair, help="time these, too (Hopper)")
    parser.add_argument(
        "--peers", nargs="*", default=[], choices=["humming"], help="time these packages, too"
    )
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, f"no CUDA GPU that PyTorch {torch.__version__} can use\n")
    formats = list(FORMATS) if "all" in args.formats else args.formats
    torch.manual_seed(0)
    for name in formats:
        check(name)
    peaks = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: ", end="")
    print(f"reads {peaks[0]:.0f} GB/s, {peaks[1]:.0f} TFLOP/s in bfloat16\n")
    asked = {name: humming_kernels.refuse(name) if args.peers else "" for name in formats}
    for name, why in asked.items():
        if why:
            print(f"humming is not timed beside {name}: {why}\n")
    print("| format | layer | tokens | us | of the floor | torch bf16 us | humming us | humming / ours |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for name in formats:
        for what in args.only:
            layers, peer = made_layers(what, name, asked[name] is None)
            stored = stored_layers(layers, name, args.act)
            if peer:
                humming_kernels.compile_for(peer[:1], [("dense", m) for m in args.tokens])
            for tokens in args.tokens:
                if what in EXPERTS:
                    made = moe_cell(EXPERTS[what], layers, tokens)
                    if asked[name] is None:
                        peer = [pack_experts(layer, made.biases) for layer in layers]
                        if tokens == args.tokens[0]:
                            compile_experts(peer[0], EXPERTS[what].top_k, args.tokens)
                    row = time_experts(made, layers, peaks, peer, args.cuts, stored)
                else:
                    row = time_linear(what, tokens, layers, peaks, peer, args.cuts, stored)
                rows.append({"format": name, "what": what, "tokens": tokens} | row)
                print(line(rows[-1]), flush=True)
            del layers, peer, stored
            torch.cuda.empty_cache()
    if args.json:
        found = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        if None in asked.values():
            found["humming"] = humming_kernels.version()
        args.json.write_text(json.dumps(found | {"peaks": peaks, "rows": rows}, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
