"""How fast the Triton kernels are on this CUDA GPU: `python bench/gpu_kernels.py [--cuts] [--json FILE]`.

MXFP4 weights and bfloat16 activations; experts with their routing, and linears. Prints a table in Markdown. First a
small problem of each kind is compared with float64. Calls are captured in a CUDA graph, with other routes and, where
weights are small, other weights each time, so that no cache holds them. Microseconds are the median of replays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.backends import triton as backend
from microscale.backends.triton.fragments import Fragments
from microscale.backends.triton.tiles import Cut
from microscale.formats import FORMATS
from microscale.quant import QuantTensor, quantize
from microscale.tolerance import linear_budget, moe_budget


@dataclass(frozen=True)
class Experts:
    """The experts of one layer of a model."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    activation: Activation
    bias: bool


MODELS = {
    "gpt-oss-20b": Experts(32, 4, 2880, 2880, GPT_OSS, True),
    "gpt-oss-120b": Experts(128, 4, 2880, 2880, GPT_OSS, True),
    "qwen3-30b-a3b": Experts(128, 8, 2048, 768, Activation("silu"), False),
}
LINEARS = {"8192x8192": (8192, 8192), "5120x2880": (5120, 2880)}
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
# Cuts to try on Hopper besides the tables': tiles, chunks, warps, stages, overlap.
CUTS: dict[int, tuple[tuple[int, int, int, int, bool], ...]] = {
    8: (
        (2, 2, 4, 4, False),
        (2, 2, 4, 4, True),
        (2, 4, 4, 3, False),
        (1, 4, 4, 4, True),
        (1, 4, 4, 4, False),
    ),
    16: ((2, 2, 4, 4, False), (2, 1, 4, 8, True)),
    32: (
        (2, 2, 4, 4, False),
        (2, 1, 4, 6, True),
        (2, 1, 8, 6, False),
        (1, 4, 4, 4, True),
        (1, 2, 4, 5, True),
    ),
    64: ((2, 1, 4, 6, True), (2, 1, 8, 6, True), (1, 2, 4, 5, True), (1, 1, 4, 6, True)),
    128: ((2, 1, 4, 5, True), (2, 1, 8, 5, True), (4, 1, 8, 6, True), (1, 1, 4, 6, True)),
    256: ((2, 1, 8, 4, True),),
}


def microseconds(calls: list[Callable[[], object]], budget_ms: float = 40) -> float:
    """Median of one call, all of them in one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def once() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    once()
    runs = max(5, min(25, int(budget_ms / max(once(), 0.05))))
    return sorted(once() for _ in range(runs))[runs // 2] * 1e3 / len(calls)


@triton.jit
def _read_kernel(x, y, n, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.int32)
    for i in range(tl.program_id(0), n // BLOCK, tl.num_programs(0)):
        acc += tl.load(x + i.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(y + tl.program_id(0), tl.sum(acc, 0))


def ceilings() -> tuple[float, float]:
    """GB/s that can be read, and TFLOP/s of bfloat16 products."""
    x = torch.zeros(1 << 28, dtype=torch.int32, device="cuda")
    y = torch.zeros(1 << 16, dtype=torch.int32, device="cuda")
    units = torch.cuda.get_device_properties(0).multi_processor_count
    read = min(
        microseconds([partial(_read_kernel[(p * units,)], x, y, x.numel(), BLOCK=block, num_warps=warps)])
        for p, block, warps in ((8, 4096, 4), (16, 2048, 4), (4, 8192, 8))
    )
    del x
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return (1 << 30) / read / 1e3, 2 * 8192**3 / microseconds([lambda: a @ b.T] * 2) / 1e6


def random_weights(*shape: int) -> backend.Packed | Fragments:
    """Any codes, and scales of 2^-9 to 2^-6."""
    fmt = FORMATS["mxfp4"]
    codes = torch.randint(256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(118, 122, (*shape[:-1], shape[-1] // 32), dtype=torch.uint8, device="cuda")
    return backend.pack(QuantTensor(fmt, shape, codes, scales))


def random_routes(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    values, ids = torch.randn(tokens, experts, device="cuda").topk(top_k)
    return ids, values.softmax(-1)


def check() -> None:
    """Each model's activation on few and small experts, and a linear, against float64."""
    for name, model in MODELS.items():
        for tokens in (1, 40, 300):
            x = torch.randn(tokens, 384, device="cuda").bfloat16()
            ids, weights = random_routes(tokens, 8, model.top_k)
            w13 = quantize(torch.randn(8, model.activation.rows(320), 384, device="cuda") / 20, "mxfp4")
            w2 = quantize(torch.randn(8, 384, 320, device="cuda") / 20, "mxfp4")
            packed = backend.pack(w13), backend.pack(w2)
            y = backend.moe(x, ids, weights, *packed, model.activation)
            worst = moe_budget(x, ids, weights, w13, w2, model.activation).worst(y)
            assert worst <= 1, f"experts of {name}, {tokens} tokens: {worst:.3g} times the permitted error"
    for tokens in (1, 20, 40, 100, 200, 300):
        x = torch.randn(tokens, 1344, device="cuda").bfloat16()
        w = quantize(torch.randn(1000, 1344, device="cuda"), "mxfp4")
        worst = linear_budget(x, w, None).worst(backend.linear(x, backend.pack(w)))
        assert worst <= 1, f"linear, {tokens} tokens: {worst:.3g} times the permitted error"


def cuts_for(tokens: float) -> list[Cut]:
    """What to try for `tokens` tokens a matrix: block_m from half of them to twice as many."""
    sizes = [m for m in CUTS if tokens / 2 <= m <= max(2 * tokens, 8)] or [max(CUTS)]
    return [Cut(m, *row) for m in sizes for row in CUTS[m]]


def fastest(times: dict[Cut, float]) -> str:
    """The three of them."""
    return ", ".join(f"{us:.1f} {cut}" for cut, us in sorted(times.items(), key=lambda item: item[1])[:3])


def time_experts(
    name: str, tokens: int, layers: list[Any], peaks: tuple[float, float], try_cuts: bool
) -> dict[str, Any]:
    """One cell: all of `moe`, routing included."""
    model = MODELS[name]
    e, top_k, hidden, inner, act = model.experts, model.top_k, model.hidden, model.inner, model.activation
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    calls = 10 if tokens <= 32 else 4 if tokens <= 512 else 2
    routes = [random_routes(tokens, e, top_k) for _ in range(calls)]
    hit = sum(len(ids.unique()) for ids, _ in routes) / calls
    read = hit * 3 * inner * hidden * 17 / 32 + 4 * tokens * hidden
    floor = max(read / peaks[0] / 1e3, 6 * tokens * top_k * inner * hidden / peaks[1] / 1e6)
    b13 = torch.randn(e, act.rows(inner), device="cuda").bfloat16() if model.bias else None
    b2 = torch.randn(e, hidden, device="cuda").bfloat16() if model.bias else None
    given = [(x, *r, *layers[i % len(layers)], act) for i, r in enumerate(routes)]
    us = microseconds([partial(backend.moe, *g, b13=b13, b2=b2) for g in given])
    tried = {}
    if try_cuts and isinstance(layers[0][0], Fragments):
        from microscale.backends.triton import hopper_moe

        apart = act.gated and not act.interleaved
        for cut in cuts_for(tokens * top_k / min(e, tokens * top_k)):
            if cut.tiles > 1 or not apart:
                both = replace(cut, tail=cut.block_m > 8)
                rest = (b13, b2, None, False, (both, both))
                tried[both] = microseconds([partial(hopper_moe.moe, *g, *rest) for g in given])
    return {"what": name, "tokens": tokens, "us": us, "floor": floor, "cuts": fastest(tried)}


def time_linear(
    name: str, tokens: int, weights: list[Any], peaks: tuple[float, float], try_cuts: bool
) -> dict[str, Any]:
    """One cell, and what torch takes for the same product of bfloat16."""
    n, k = LINEARS[name]
    x, plain = torch.randn(tokens, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
    read = n * k * 17 / 32 + 2 * tokens * (n + k)
    floor = max(read / peaks[0] / 1e3, 2 * tokens * n * k / peaks[1] / 1e6)
    used = weights if tokens <= 128 else weights[:4]
    us = microseconds([partial(backend.linear, x, w) for w in used])
    tried = {}
    if try_cuts and isinstance(weights[0], Fragments):
        from microscale.backends.triton import hopper

        for cut in cuts_for(tokens):
            tried[cut] = microseconds([partial(hopper.linear, x, w, None, cut) for w in used])
    bf16 = microseconds([partial(torch.nn.functional.linear, x, plain)] * 2)
    return {
        "what": name,
        "tokens": tokens,
        "us": us,
        "floor": floor,
        "bf16": bf16,
        "cuts": fastest(tried),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*MODELS, *LINEARS], choices=[*MODELS, *LINEARS])
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument(
        "--cuts", action="store_true", help="on Hopper, also time other ways to cut each product"
    )
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    torch.manual_seed(0)
    check()
    peaks = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: ", end="")
    print(f"reads {peaks[0]:.0f} GB/s, {peaks[1]:.0f} TFLOP/s in bfloat16\n")
    print("| layer | tokens | us | of the floor | torch bf16 us | fastest cuts |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    rows = []
    for name in args.only:
        if name in MODELS:
            m = MODELS[name]
            count = 1 if name == "gpt-oss-120b" else 2
            w13 = (m.experts, m.activation.rows(m.inner), m.hidden)
            w2 = (m.experts, m.hidden, m.inner)
            layers: list[Any] = [(random_weights(*w13), random_weights(*w2)) for _ in range(count)]
            time_one = time_experts
        else:
            n, k = LINEARS[name]
            layers = [random_weights(n, k) for _ in range(max(2, int(3.5e8 / (n * k * 17 / 32))))]
            time_one = time_linear
        for tokens in args.tokens:
            row = time_one(name, tokens, layers, peaks, args.cuts)
            rows.append(row)
            bf16 = f"{row['bf16']:.1f}" if "bf16" in row else ""
            print(
                f"| {name} | {tokens} | {row['us']:.1f} | {row['floor'] / row['us']:.2f} | {bf16} | {row['cuts']} |"
            )
        del layers
        torch.cuda.empty_cache()
    if args.json:
        found = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        args.json.write_text(json.dumps(found | {"peaks": peaks, "rows": rows}, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
