"""How fast the Triton kernels are on this CUDA GPU: `python bench/gpu_kernels.py [--formats all] [--json FILE]`.

Bfloat16 activations; experts with their routing, and linears. Prints a table in Markdown. First a small problem of each
kind is compared with float64. Calls are captured in a CUDA graph, with other routes and, where weights are small, other
weights each time, so that no cache holds them. Microseconds are the median of replays.
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
from microscale.bench.gpu import (
    LINEARS,
    MODELS,
    ceilings,
    floor,
    microseconds,
    moe_cell,
    moe_layers,
    random_routes,
    random_weights,
)
from microscale.formats import FORMATS
from microscale.quant import quantize
from microscale.tolerance import linear_budget, moe_budget

TOKENS = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)


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


def time_linear(name: str, tokens: int, weights: list[Any], peaks: tuple[float, float]) -> dict[str, Any]:
    """One cell, and what torch takes for the same product of bfloat16."""
    n, k = LINEARS[name]
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    plain = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(4)]
    read = n * k * weights[0].format.bits_per_weight / 8 + 2 * tokens * (n + k)
    used = weights if tokens <= 128 else weights[:4]
    us = microseconds([partial(backend.linear, x, w) for w in used])
    bf16 = microseconds([partial(torch.nn.functional.linear, x, p) for p in plain])
    return {"us": us, "floor": floor(read, 2.0 * tokens * n * k, peaks), "bf16": bf16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*MODELS, *LINEARS], choices=[*MODELS, *LINEARS])
    parser.add_argument("--formats", nargs="*", default=["mxfp4"], choices=[*FORMATS, "all"])
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    formats = list(FORMATS) if "all" in args.formats else args.formats
    torch.manual_seed(0)
    for name in formats:
        check(name)
    peaks = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: ", end="")
    print(f"reads {peaks[0]:.0f} GB/s, {peaks[1]:.0f} TFLOP/s in bfloat16\n")
    print("| format | layer | tokens | us | of the floor | torch bf16 us |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    rows = []
    for name in formats:
        for what in args.only:
            layers: list[Any]
            if what in MODELS:
                layers = moe_layers(MODELS[what], name, 1 if what == "gpt-oss-120b" else 2)
            else:
                n, k = LINEARS[what]
                bytes_each = n * k * FORMATS[name].bits_per_weight / 8
                layers = [random_weights(name, n, k) for _ in range(max(4, int(3.5e8 / bytes_each)))]
            for tokens in args.tokens:
                if what in MODELS:
                    cell = moe_cell(MODELS[what], layers, tokens)
                    b13, b2 = cell.biases
                    us = microseconds([partial(backend.moe, *g, b13=b13, b2=b2) for g in cell.given])
                    row = {"us": us, "floor": floor(cell.read, cell.operations, peaks)}
                else:
                    row = time_linear(what, tokens, layers, peaks)
                rows.append({"format": name, "what": what, "tokens": tokens} | row)
                bf16 = f"{row['bf16']:.1f}" if "bf16" in row else ""
                part = row["floor"] / row["us"]
                print(f"| {name} | {what} | {tokens} | {row['us']:.1f} | {part:.2f} | {bf16} |", flush=True)
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
