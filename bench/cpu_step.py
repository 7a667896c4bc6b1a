"""A decoded token on the CPU as one chain of the core's kernels, beside the same token by a model's modules.

Both generate in turn in one process, so that what the machine's neighbours do meets both. A token's time is from its
arrival to the next one's, the generate loop included; of it the core's kernels are what the core itself saw.

    python bench/cpu_step.py gpt-oss-20b --layers 4     # random weights; all layers: 14 GB
    python bench/cpu_step.py stdlib-moe --real
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

import microscale
from microscale.backends import cpu_core


class Arrivals(BaseStreamer):
    """When each token came, and what the core had taken until then."""

    def __init__(self, core: dict[str, float]) -> None:
        self.core, self.seen = core, list[tuple[float, float]]()

    def put(self, value: Any) -> None:
        """Note it."""
        self.seen.append((time.perf_counter(), sum(self.core.values())))

    def end(self) -> None:
        """Nothing is left."""


def tokens(decoder: Any, ids: torch.Tensor, new: int) -> tuple[list[float], list[float], torch.Tensor]:
    """Milliseconds of each token, and of it outside the core; and the ids."""
    core: dict[str, float] = {}
    arrivals = Arrivals(core)
    with torch.inference_mode(), cpu_core.timed(core):
        out = decoder.generate(
            ids,
            new,
            attention_mask=torch.ones_like(ids),
            streamer=arrivals,
            do_sample=False,
            eos_token_id=None,
        )
    seen = arrivals.seen[2:]  # the prompt's, and the first token's
    pairs = list(pairwise(seen))
    whole = [(b[0] - a[0]) * 1e3 for a, b in pairs]
    return whole, [w - (b[1] - a[1]) * 1e3 for w, (a, b) in zip(whole, pairs, strict=True)], out


def main() -> None:
    """Print medians and quartiles."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--real", action="store_true", help="read the weights; default: random ones")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    options: dict[str, Any] = {} if args.real else {"load_format": "dummy", "layers": args.layers}
    model = microscale.load(args.model, device="cpu", **options)
    ids = torch.randint(2, 150, (1, args.prompt))
    decoders = {"modules": microscale.Decoder(model, graph=False), "chain": microscale.Decoder(model)}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in decoders}
    found: dict[str, torch.Tensor] = {}
    for _ in range(args.rounds):
        for name, decoder in decoders.items():
            whole, outside, found[name] = tokens(decoder, ids, args.new)
            times[name][0].extend(whole)
            times[name][1].extend(outside)
    chain = decoders["chain"]
    assert chain.fused, chain.why
    print(f"{args.model}, {model.config.num_hidden_layers} layers, {torch.get_num_threads()} threads:")
    for name, (whole, outside) in times.items():
        low, _, high = quantiles(whole)
        print(
            f"  {name:8} {median(whole):7.2f} ms a token ({low:.2f} to {high:.2f}), "
            f"outside the core {median(outside):6.2f} ({min(outside):.2f} to {max(outside):.2f})"
        )
    print("  the same tokens" if torch.equal(*found.values()) else "  other tokens")


if __name__ == "__main__":
    main()
