"""What a token of a dummy takes on a GPU: the graph of its step, replayed with its keys in place, beside reading alone.

    PYTHONPATH=src python bench/gpu_step.py gpt-oss-20b gpt-oss-120b DIRECTORY --prompts 16 2048 [--kernels]

A model is a bundled name, or the path of a directory with a `config.json`. Weights are random and made on the GPU.
Tokens a second are those of `Decoder.generate`, greedily, of a second generation, whose step is there already: the
median of three.

With `--kernels` each kernel of a layer is listed, too, behind all else: graphs are slower to launch once a profiler
has looked. Its own time begins where the one ahead of it ended, before which part of its weights may have come.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

import microscale
from microscale.bench.gpu import read_rate
from microscale.cli.gpu_timing import events, owns
from microscale.integrations.hf.step import Step
from microscale.integrations.hf.step_cache import StepCache
from microscale.plan import outline

_ATTENTION = "_span_kernel"  # one a layer, the second of its kernels


def captured(model: Any, prompt: int) -> Step:
    """A step behind so many tokens, as a graph."""
    cache = StepCache(model.config.get_text_config(decoder=True), prompt + 256, model.device)
    step = Step(model, cache, 1)
    ids = torch.randint(1000, (1, prompt), device=model.device)
    model(ids, past_key_values=cache)
    cache.start(prompt)
    for _ in range(3):
        step(ids[:, -1:])
    if not step.captured:
        raise SystemExit(f"its step is not replayed: {step.why}")
    return step


def graph_ms(step: Step, prompt: int, replays: int) -> tuple[float, float, float]:
    """Median and quartiles of a step's graph behind so many tokens, in milliseconds."""
    times = []
    for _ in range(replays):
        step.cache.position.fill_(prompt + 3)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step._replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    low, median, high = statistics.quantiles(times, n=4)
    return median, low, high


def by_place(replays: Sequence[Sequence[tuple[str, float]]]) -> list[tuple[str, float]]:
    """(name, microseconds) of each kernel of a layer, in their order, and of the last one, which is lm_head's.

    Args:
        replays: (name, seconds) of each kernel of each replay, in their order. The median of these counts, and of that
            the mean of all layers but the first and the last.
    """
    names = [name for name, _ in replays[0]]
    times = [statistics.median(seconds for _, seconds in place) for place in zip(*replays, strict=True)]
    begins = [i - 1 for i, name in enumerate(names) if name == _ATTENTION]
    inner = range(1, len(begins) - 1)
    found = [
        (names[begins[1] + i], 1e6 * statistics.mean(times[begins[layer] + i] for layer in inner))
        for i in range(begins[2] - begins[1])
    ]
    return [*found, (names[-1], 1e6 * times[-1])]


def kernels(step: Step, prompt: int, replays: int = 6) -> list[tuple[str, float]]:
    """`by_place` of replays under the profiler."""
    found = []
    for _ in range(replays):
        step.cache.position.fill_(prompt + 3)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step._replay()
            torch.cuda.synchronize()
        found.append(owns(events(profiler)))
    return by_place(found)


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
    parser.add_argument("--kernels", action="store_true")
    given = parser.parse_args()
    for name in given.models:
        model = microscale.load(name, load_format="dummy")
        read = outline(name).read
        steps = {}
        with torch.inference_mode():
            for prompt in given.prompts:
                steps[prompt] = captured(model, prompt)
                median, low, high = graph_ms(steps[prompt], prompt, given.replays)
                rate = statistics.median(tokens_per_second(model, prompt, given.tokens) for _ in range(3))
                peak = read_rate()
                floor = read / peak / 1e6
                print(
                    f"{name}, prompt of {prompt}: {rate:.0f} tokens a second; graph {median:.3f} ms "
                    f"({low:.3f} to {high:.3f}); reading {read / 1e9:.3f} GB at {peak:.0f} GB/s takes {floor:.3f} ms: "
                    f"{floor * rate / 1e3:.2f} of {1e3 / floor:.0f} tokens a second",
                    flush=True,
                )
            for prompt, step in steps.items() if given.kernels else ():
                listed = ", ".join(f"{kernel} {us:.2f}" for kernel, us in kernels(step, prompt))
                print(f"{name}, prompt of {prompt}, us: {listed}", flush=True)
        del steps
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
