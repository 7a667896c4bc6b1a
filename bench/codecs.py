"""How fast tensors are quantised and dequantised: `python bench/codecs.py [--device cuda]`. Prints a table."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from microscale.formats import FORMATS
from microscale.quant import dequantize, quantize


def milliseconds(run: Callable[[], object], device: str, runs: int) -> tuple[float, float]:
    """Median and spread (maximum - minimum) of single runs, after one that is not counted."""
    times = []
    for i in range(runs + 1):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.get_device_module(device).synchronize()
        if i:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), max(times) - min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2880, help="of a square float32 weight")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    x = torch.randn(args.size, args.size, device=args.device)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.size} x {args.size} on {args.device}"
    )
    print("| format | quantize ms | spread | dequantize to bf16 ms | spread |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in FORMATS:
        q = quantize(x, name)
        there = milliseconds(lambda name=name: quantize(x, name), args.device, args.runs)
        back = milliseconds(lambda q=q: dequantize(q, torch.bfloat16), args.device, args.runs)
        print(f"| {name} | {there[0]:.1f} | {there[1]:.1f} | {back[0]:.1f} | {back[1]:.1f} |")


if __name__ == "__main__":
    main()
