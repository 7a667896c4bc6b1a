"""What a token of a dummy takes on a GPU: the graph of its step, replayed with its keys in place, beside reading alone.

    PYTHONPATH=src python bench/gpu_step.py gpt-oss-20b gpt-oss-120b DIRECTORY --prompts 16 2048

A model is a bundled name, or the path of a directory with a `config.json`. Weights are random and made on the GPU.
Tokens a second are those of `Decoder.generate`, greedily, of a second generation, whose step is there already.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import microscale
from microscale.bench.gpu import read_rate
from microscale.integrations.hf.step import Step
from microscale.integrations.hf.step_cache import StepCache
from microscale.plan import outline


def graph_ms(model: Any, prompt: int, replays: int) -> tuple[float, float, float]:
    """Median and quartiles of a step's graph behind so many tokens, in milliseconds."""
    cache = StepCache(model.config.get_text_config(decoder=True), prompt + 256, model.device)
    step = Step(model, cache, 1)
    ids = torch.randint(1000, (1, prompt), device=model.device)
    model(ids, past_key_values=cache)
    cache.start(prompt)
    for _ in range(3):
        step(ids[:, -1:])
    if not step.captured:
        raise SystemExit(f"its step is not replayed: {step.why}")
    times = []
    for _ in range(replays):
        cache.position.fill_(prompt + 3)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step._replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    low, median, high = statistics.quantiles(times, n=4)
    return median, low, high


def tokens_per_second(model: Any, prompt: int, tokens: int) -> float:
    """Of the second of two generations, from its second token on; the first token's time is subtracted as a whole."""
    decoder = microscale.Decoder(model)
    ids = torch.randint(1000, (1, prompt), device=model.device)
    took = {}
    for count in (tokens, 1, tokens):
        torch.cuda.synchronize()
        started = time.perf_counter()
        decoder.generate(ids, count, eos_token_id=None, attention_mask=torch.ones_like(ids))
        torch.cuda.synchronize()
        took[count] = time.perf_counter() - started
    if decoder.why is not None:
        print(f"steps were not replayed: {decoder.why}")
    return (tokens - 1) / (took[tokens] - took[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompts", nargs="+", type=int, default=[16, 2048])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--replays", type=int, default=50)
    given = parser.parse_args()
    for name in given.models:
        model = microscale.load(name, load_format="dummy")
        read = outline(name).read
        with torch.inference_mode():
            for prompt in given.prompts:
                median, low, high = graph_ms(model, prompt, given.replays)
                rate = tokens_per_second(model, prompt, given.tokens)
                peak = read_rate()
                floor = read / peak / 1e6
                print(
                    f"{name}, prompt of {prompt}: {rate:.0f} tokens a second; graph {median:.3f} ms "
                    f"({low:.3f} to {high:.3f}); reading {read / 1e9:.3f} GB at {peak:.0f} GB/s takes {floor:.3f} ms: "
                    f"{floor * rate / 1e3:.2f} of {1e3 / floor:.0f} tokens a second",
                    flush=True,
                )
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
