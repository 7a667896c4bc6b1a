"""What attention of one token takes where it stands in a step: between two products, whose weights are read meanwhile.

    PYTHONPATH=src python bench/gpu_attention.py --keys 128 2048 32768

A chain of six layers, each the products of q, k and v, attention, and that of o, beside the same chain without
attention: printed are the microseconds of a layer's difference, and of a layer without. Graphs are replayed in turn.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from microscale.backends.triton import rows
from microscale.backends.triton.attend import Turn, attend_token
from microscale.bench.gpu import interleaved

LAYERS = 6
# Heads, key heads, their width, columns of a token, and whether there are sinks and norms of heads.
SHAPES = {"gpt-oss": (64, 8, 64, 2880, True, False), "Qwen3-30B-A3B": (32, 4, 128, 2048, False, True)}


def random(*shape: int) -> Tensor:
    return (torch.randn(*shape, device="cuda") / 20).bfloat16()


class Chain:
    """Layers whose caches hold so many keys."""

    def __init__(self, name: str, keys: int) -> None:
        self.heads, self.key_heads, self.width, columns, sinks, normed = SHAPES[name]
        norms = (random(self.width), random(self.width), 1e-6) if normed else ()
        self.turn = Turn(*(random(keys, self.width // 2) for _ in "cs"), *norms)
        sizes = [n * self.width for n in (self.heads, self.key_heads, self.key_heads)]
        self.layers: list[Any] = [
            (
                [random(n, columns) for n in sizes],
                random(columns, sizes[0]),
                *(random(1, self.key_heads, keys, self.width) for _ in "kv"),
                random(self.heads) if sinks else None,
            )
            for _ in range(LAYERS)
        ]
        self.x, self.sizes = random(1, columns), sizes
        self.last = torch.tensor([keys - 1], device="cuda")
        self.arrived = torch.zeros(self.key_heads, dtype=torch.int32, device="cuda")

    def run(self, attention: bool) -> Tensor:
        x = self.x
        for weights, out, keys, values, sinks in self.layers:
            of_all = rows.linear(x, weights, [None] * 3)
            q, k, v = of_all.split(self.sizes, -1)
            if attention:
                scaling = self.width**-0.5
                given = (q, k, v, self.turn, keys, values, sinks, scaling, self.last, self.arrived)
                q = attend_token(*given).view(1, -1)
            x = rows.linear(q, [out], [None])
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", nargs="+", type=int, default=[128, 512, 2048, 8192, 32768])
    given = parser.parse_args()
    for name in SHAPES:
        for keys in given.keys:
            chain = Chain(name, keys)
            calls = {str(there): [partial(chain.run, there)] for there in (True, False)}
            with torch.no_grad():
                both, without = (t.median / LAYERS for t in interleaved(calls, 80).values())
            print(f"{name}, {keys} keys: {both - without:.1f} beside {without:.1f}", flush=True)


if __name__ == "__main__":
    main()
