"""A prompt of gpt-oss on the CPU: attention with sinks beside its logarithm, and over keys that stand for the sinks.

Both run in turn in one process over the same model with random weights; the second is what gradients still take.

    python bench/cpu_prompt.py --layers 2 --prompt 512 2048
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import microscale
from microscale.backends import cpu_core
from microscale.integrations.hf import attention


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Print medians of a whole prompt, of it the core's share, and of attention alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = microscale.load(
        "gpt-oss-20b", load_format="dummy", layers=args.layers, device="cpu", canary="off"
    )
    takes, spent = attention._prompt, [0.0]
    functions = attention.AttentionInterface()
    inner = functions[attention.NAME]

    def timed(*operands: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = inner(*operands, **options)
        spent[0] += time.perf_counter() - started
        return found

    attention.AttentionInterface.register(attention.NAME, timed)
    for length in args.prompt:
        ids = torch.randint(2, 150, (1, length))
        rows: dict[str, list[tuple[float, float, float]]] = {"sinks as keys": [], "sinks beside": []}
        for i in range(args.rounds + 1):
            for name, how in zip(rows, (lambda *_: False, takes), strict=True):
                attention._prompt, core, spent[0] = how, dict[str, float](), 0.0
                with torch.inference_mode(), cpu_core.timed(core):
                    whole = seconds(lambda ids=ids: model(ids, use_cache=True, logits_to_keep=1))
                if i:  # the first loads what there is to load
                    rows[name].append((whole * 1e3, sum(core.values()) * 1e3, spent[0] * 1e3))
        for name, found in rows.items():
            whole, ours, spans = (median(column) for column in zip(*found, strict=True))
            print(
                f"{args.layers} layers, {length} tokens, {name}: {whole:.0f} ms, "
                f"of it the core {ours:.0f}, attention {spans:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
