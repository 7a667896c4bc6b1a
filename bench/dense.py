"""16-bit linears on a CPU: the C++ core beside PyTorch's own F.linear, in turn: `python bench/dense.py`.

By default shapes of gpt-oss-20b: q, k and v, o, router, and a part of lm_head. Each call finds its weights in no cache.
Fractions are of the floor that the machine's ceilings of the same moments set; ratios are PyTorch's time over ours,
pair by pair. `ROWS` in src/microscale/dense.py, up to how many rows a layer calls the core, comes from the last column.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from microscale import env
from microscale.backends import cpu_core
from microscale.bench.ceilings import Probe
from microscale.bench.layers import DenseLayers
from microscale.bench.shapes import parse_shape
from microscale.bench.timing import Times, measure
from microscale.canary import DTYPES
from microscale.machine import cache_bytes, detect

SHAPES = "4096x2880,512x2880,2880x4096,32x2880,50272x2880"
PAUSE = 0.0005  # seconds in which the threads of the one before stop spinning


def ratio(theirs: Times, ours: Times) -> float:
    """The median over pairs of neighbouring calls."""
    return median(t / o for t, o in zip(theirs.seconds, ours.seconds, strict=True))


def row(shape: str, dtype: str, m: int, ours: Times, theirs: Times) -> dict[str, Any]:
    return {
        "shape": shape,
        "dtype": dtype,
        "m": m,
        "ours": ours.document(),
        "torch": theirs.document(),
        "ratio": ratio(theirs, ours),
    }


def line(r: dict[str, Any]) -> str:
    ours, theirs = r["ours"], r["torch"]
    return (
        f"{r['shape']:>11} {r['dtype']:>5} {r['m']:>3} {ours['seconds_median'] * 1e3:9.3f} "
        f"{theirs['seconds_median'] * 1e3:9.3f} {ours['read_rate'] / 1e9:9.1f} {ours['of_floor']:9.2f} "
        f"{theirs['of_floor']:9.2f} {r['ratio']:9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default=SHAPES, help="outputs x inputs, with commas between")
    parser.add_argument("--dtype", default="bf16", help="bf16, fp16, fp32, with commas between")
    parser.add_argument("--m", default="1,2,3,4,6,8,12,16", help="rows, with commas between")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="JSON alone")
    args = parser.parse_args()

    level = env.CPU_LEVELS[cpu_core.level()]
    cache, memory = cache_bytes() or 256 << 20, detect().memory
    generator = torch.Generator().manual_seed(0)
    probe = Probe(level, torch.get_num_threads(), cache, memory)
    if not args.json:
        print(f"{detect().cpu}, {level}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(
            f"{'shape':>11} {'dtype':>5} {'M':>3} {'ours ms':>9} {'torch ms':>9} {'ours GB/s':>9} "
            f"{'of floor':>9} {'torch':>9} {'torch/us':>9}"
        )
    rows = []
    for shape in map(parse_shape, args.shape.split(",")):
        for dtype in args.dtype.split(","):
            layers = DenseLayers(shape, DTYPES[dtype], cache, memory // 8, generator)
            for m in map(int, args.m.split(",")):
                with torch.inference_mode():
                    kinds = (partial(layers.call, m), partial(layers.call, m, F.linear))
                    ours, theirs = measure(kinds, probe, args.repeat, pause=PAUSE)
                rows.append(row(shape.name, dtype, m, ours, theirs))
                if not args.json:
                    print(line(rows[-1]), flush=True)
    ceilings = probe.since(0)
    print(
        json.dumps({"level": level, "read_rate": ceilings.read, "flop_rate": ceilings.multiply, "rows": rows})
    )


if __name__ == "__main__":
    main()
