"""What one unrelated process that spins on one of the processors costs a token: `python bench/busy.py`.

MoE layers with M = 1, quiet and busy in turn. Work that is handed out in equal parts would wait for the slower
thread; units that are handed out one by one do not. The promise on two cores is at most 2.5 times the quiet time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from microscale.backends import cpu_core
from microscale.bench.layers import Layers
from microscale.bench.shapes import parse_shape
from microscale.bench.timing import timed
from microscale.env import CPU_LEVELS
from microscale.formats import FORMATS
from microscale.machine import cache_bytes, detect

CALLS = 60  # of each round; the first third is not counted
SETTLE = 0.2  # seconds that the scheduler gets to move threads


def calls(layers: Layers, m: int) -> list[float]:
    """Seconds of a round's calls."""
    time.sleep(SETTLE)
    return [timed(layers.call(m)) for _ in range(CALLS)][CALLS // 3 :]


def spinning(core: int) -> subprocess.Popen[bytes]:
    """A process that does nothing else, on one processor."""
    code = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    return subprocess.Popen([sys.executable, "-c", code])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-30b-a3b,gpt-oss-20b", help="as in `bench kernels`")
    parser.add_argument("--format", default="mxfp4", choices=FORMATS)
    parser.add_argument("--m", type=int, default=1, help="tokens")
    parser.add_argument("--core", type=int, default=0, help="the spinning process's")
    parser.add_argument("--rounds", type=int, default=5, help="of quiet and busy in turn")
    parser.add_argument("--save", type=Path, help="write a JSON document here")
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    cache, memory = cache_bytes() or 256 << 20, detect().memory
    level, threads = CPU_LEVELS[cpu_core.level()], torch.get_num_threads()
    print(f"{detect().cpu}, {level}, {threads} threads, a process spinning on processor {args.core}")
    print(f"{'shape':>14} {'M':>3} {'quiet ms':>9} {'busy ms':>9} {'ratio':>6} {'worst round':>11}")
    rows = []
    for shape in map(parse_shape, args.shape.split(",")):
        layers = Layers(shape, FORMATS[args.format], cache, memory // 8, generator)
        quiet: list[list[float]] = []
        busy: list[list[float]] = []
        with torch.inference_mode():
            for _ in range(args.rounds):
                quiet.append(calls(layers, args.m))
                process = spinning(args.core)
                try:
                    busy.append(calls(layers, args.m))
                finally:
                    process.kill()
                    process.wait()
        q, b = (median(s for r in rounds for s in r) for rounds in (quiet, busy))
        worst = max(median(y) / median(x) for x, y in zip(quiet, busy, strict=True))
        rows.append({"shape": shape.name, "m": args.m, "level": level, "quiet": quiet, "busy": busy})
        print(f"{shape.name:>14} {args.m:>3} {q * 1e3:9.3f} {b * 1e3:9.3f} {b / q:6.2f} {worst:11.2f}")
    if args.save is not None:
        args.save.write_text(json.dumps({"threads": threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
