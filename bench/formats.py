"""Every format beside MXFP4 at every level, in turn: `python bench/formats.py --shape qwen3-30b-a3b`.

A format's time is divided by what its bytes predict from MXFP4's time: 1 means that its kernels read as fast. Formats
measured one after the other would say more about the minutes than about themselves: the machine's reading rate moves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from microscale.backends import cpu_core
from microscale.bench.ceilings import Probe
from microscale.bench.layers import Layers
from microscale.bench.shapes import Shape, parse_shape
from microscale.bench.timing import Times, measure
from microscale.env import CPU_LEVELS
from microscale.formats import FORMATS
from microscale.machine import cache_bytes, detect

BASE = "mxfp4"
PAUSE = 0.0005  # seconds in which the threads of the one before stop spinning


def row(shape: Shape, name: str, level: str, m: int, base: Times, times: Times) -> dict[str, Any]:
    """One case for JSON. Pairs of neighbouring calls share their minute, but not the number of experts hit."""

    def each(t: Times) -> list[float]:
        return [seconds / bytes for seconds, bytes in zip(t.seconds, t.bytes, strict=True)]

    pairs = zip(each(times), each(base), strict=True)
    ratios = {"ratio": median(a / b for a, b in pairs), "ratio_min": min(each(times)) / min(each(base))}
    where = {"shape": shape.name, "format": name, "level": level, "m": m}
    return where | ratios | {"times": times.document(), BASE: base.document()}


def line(r: dict[str, Any]) -> str:
    """A row of the table."""
    ours, base = r["times"], r[BASE]
    return (
        f"{r['shape']:>14} {r['format']:>12} {r['level']:>12} {r['m']:>3} {ours['seconds_median'] * 1e3:8.3f} "
        f"{base['seconds_median'] * 1e3:8.3f} {r['ratio']:6.2f} {r['ratio_min']:6.2f} {ours['of_floor']:9.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=parse_shape, default="qwen3-30b-a3b", help="as in `bench kernels`")
    parser.add_argument("--format", default=",".join(f for f in FORMATS if f != BASE), help="commas between")
    parser.add_argument("--level", default="avx2,avx512,avx512_bf16", help="commas between")
    parser.add_argument("--m", default="1,16", help="tokens, with commas between")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument(
        "--own-time", action="store_true", help="one thread and its own time: other processes matter little"
    )
    parser.add_argument("--save", type=Path, help="write a JSON document here")
    args = parser.parse_args()

    cache, memory = cache_bytes() or 256 << 20, detect().memory
    generator = torch.Generator().manual_seed(0)
    if args.own_time:
        torch.set_num_threads(1)
    threads, clock = torch.get_num_threads(), time.thread_time if args.own_time else time.perf_counter
    probe = Probe(CPU_LEVELS[cpu_core.level()], threads, cache, memory)
    base = Layers(args.shape, FORMATS[BASE], cache, memory // 8, generator)
    print(f"{detect().cpu}, {threads} threads")
    head = f"{'shape':>14} {'format':>12} {'level':>12} {'M':>3} {'ms':>8} {BASE + ' ms':>8} {'/bytes':>6}"
    print(f"{head} {'by min':>6} {'of floor':>9}")
    rows = []
    for name in args.format.split(","):
        layers = Layers(args.shape, FORMATS[name], cache, memory // 8, generator)
        for level in args.level.split(","):
            os.environ["MICROSCALE_CPU_LEVEL"] = level
            for m in map(int, args.m.split(",")):
                with torch.inference_mode():
                    kinds = (partial(base.call, m), partial(layers.call, m))
                    before, after = measure(kinds, probe.at(level), args.repeat, pause=PAUSE, clock=clock)
                rows.append(row(args.shape, name, level, m, before, after))
                print(line(rows[-1]), flush=True)
    if args.save is not None:
        args.save.write_text(json.dumps({"threads": threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
