"""Any change to a valid checkpoint either opens, all of it readable, or is a `CheckpointError`; soon, and cheaply.

About 3000 cases; MICROSCALE_TEST_FUZZ=10 makes ten times as many.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import INTEGERS, JUNK, dump, mutate_bytes, mutate_header
from safetensors import safe_open
from tiny import config, file_bytes, gpt_oss_state, peak_rss_kib

from microscale.checkpoints import Checkpoint, Source, gpt_oss, open_checkpoint, write
from microscale.errors import CheckpointError
from microscale.quant import QuantTensor

T = TypeVar("T")

TIMES = int(os.environ.get("MICROSCALE_TEST_FUZZ") or 1)
SECONDS = 1.0
PYTHON_BYTES = 8 << 20  # Python's own peak in one case; a tiny checkpoint takes under 1 MB
RSS_KIB = 64 << 10  # all cases of a test together, what Hypothesis takes between them left out

SMALL = config(num_hidden_layers=1)


def cases(n: int) -> Callable[[Any], Any]:
    """Hypothesis settings for n cases, times MICROSCALE_TEST_FUZZ."""
    return settings(
        max_examples=n * TIMES,
        deadline=None,  # each case's own CPU time is bounded below: wall time is other processes', too
        suppress_health_check=list(
            HealthCheck
        ),  # the fixture is a whole test's on purpose; cases may be slow
        database=None,
    )


class Bench:
    """A directory with one checkpoint in it, rewritten for each case, and how each case ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: Counter[str] = Counter()
        self.grown = 0  # KiB
        torch.manual_seed(0)
        write(path / "one", SMALL, gpt_oss_state(SMALL))
        write(path / "many", SMALL, gpt_oss_state(SMALL), max_shard_bytes=12_000)
        (path / "config").mkdir()
        shutil.copy(path / "one" / "model.safetensors", path / "config")
        self.one = (path / "one" / "model.safetensors").read_bytes()
        start = 8 + int.from_bytes(self.one[:8], "little")
        self.header = self.one[8:start]
        self.data = self.one[start:]
        self.index = (path / "many" / "model.safetensors.index.json").read_bytes()

    def check(self, directory: Path) -> None:
        """The property. Reads every byte of what opens."""
        source = self.bounded(lambda: read_all(Source.open(directory)))
        if source is not None:  # we are the stricter: what we open, safetensors opens, and sees the same
            for file in source.files:
                with safe_open(file, "pt") as theirs:
                    assert set(theirs.keys()) == {i.name for i in source if i.file == file}
        checkpoint = self.bounded(lambda: load_all(open_checkpoint(directory)))
        self.outcomes["refused" if source is None else "mapped" if checkpoint is None else "opened"] += 1

    def bounded(self, opening: Callable[[], T]) -> T | None:
        """The result, or None for a CheckpointError, in bounded time and memory."""
        result, message = None, ""
        rss = peak_rss_kib()
        tracemalloc.start()  # not around Hypothesis, which it slows down tenfold
        start = time.thread_time()
        try:
            result = opening()
        except CheckpointError as e:
            message = str(e)
        finally:
            seconds, peak = time.thread_time() - start, tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        self.grown += peak_rss_kib() - rss
        assert seconds < SECONDS
        assert peak < PYTHON_BYTES
        assert len(message.encode()) < 2000  # printable, and short however long the lie
        return result


def read_all(source: Source) -> Source:
    """Every tensor is what its info says, to the last byte."""
    for info in source:
        t = source.tensor(info.name)
        assert (t.dtype, tuple(t.shape)) == (info.dtype, info.shape)
        assert t.numel() * t.element_size() == info.nbytes
        assert info.nbytes == 0 or 0 <= int(t.reshape(-1).view(torch.uint8).sum()) <= 255 * info.nbytes
    return source


def load_all(checkpoint: Checkpoint) -> Checkpoint:
    """Every entry loads, and its scales can be scanned."""
    gpt_oss.activation(checkpoint.config)
    for entry in checkpoint.groups:
        weight = checkpoint.load(entry)
        assert tuple(weight.shape) == entry.shape
        assert not isinstance(weight, QuantTensor) or gpt_oss.nan_scales(weight) >= 0
    return checkpoint


@pytest.fixture(scope="module")
def shared() -> Iterator[Bench]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of files: spare the disk
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Bench(Path(path))


@pytest.fixture
def bench(shared: Bench) -> Iterator[Bench]:
    """The bench, with its leak checks around all cases of a test."""
    descriptors = Path("/proc/self/fd")
    gc.collect()
    opened = len(list(descriptors.iterdir())) if sys.platform == "linux" else 0
    shared.outcomes.clear()
    shared.grown = 0
    yield shared
    gc.collect()
    print(dict(shared.outcomes), f"{shared.grown} KiB")
    assert not opened or len(list(descriptors.iterdir())) == opened
    assert shared.grown < RSS_KIB * TIMES
    assert shared.outcomes["opened"]  # neither branch of the property is idle
    assert shared.outcomes["opened"] < shared.outcomes.total()


@cases(1200)
@given(data=st.data())
def test_header_json(bench: Bench, data: st.DataObject) -> None:
    header = json.loads(bench.header)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate_header(data.draw, header, len(bench.data))
    directory = bench.path / "one"
    (directory / "model.safetensors").write_bytes(file_bytes(dump(header), bench.data))
    bench.check(directory)


@cases(800)
@given(data=st.data())
def test_file_bytes(bench: Bench, data: st.DataObject) -> None:
    raw = bench.one
    for _ in range(data.draw(st.integers(1, 2))):
        raw = mutate_bytes(data.draw, raw, len(bench.one) - len(bench.data))
    directory = bench.path / "one"
    (directory / "model.safetensors").write_bytes(raw)
    bench.check(directory)


@cases(800)
@given(data=st.data())
def test_config(bench: Bench, data: st.DataObject) -> None:
    draw, directory = data.draw, bench.path / "config"
    cfg = config(num_hidden_layers=1)
    for _ in range(draw(st.integers(1, 2))):
        where = cfg
        if draw(st.booleans()) and isinstance(cfg.get("quantization_config"), dict):
            where = cfg["quantization_config"]
        key = draw(st.sampled_from((*SMALL, "swiglu_alpha", "attention_bias", "auto_map", *where)))
        if draw(st.integers(0, 4)) == 0:
            where.pop(key, None)
        else:
            where[key] = draw(JUNK | INTEGERS | st.lists(st.text("*?[]!.lm_headx", max_size=9), max_size=5))
    raw = dump(cfg)
    if draw(st.integers(0, 3)) == 0:
        raw = mutate_bytes(draw, raw, len(raw))
    (directory / "config.json").write_bytes(raw)
    bench.check(directory)


@cases(400)
@given(data=st.data())
def test_index(bench: Bench, data: st.DataObject) -> None:
    draw, directory = data.draw, bench.path / "many"
    index = json.loads(bench.index)
    weights = index["weight_map"]
    shards = sorted(set(weights.values()))
    name = draw(st.sampled_from(sorted(weights)))
    kind = draw(st.sampled_from(("shard", "junk", "drop", "add", "map", "order", "bytes", "lost")))
    if kind == "shard":
        weights[name] = draw(st.sampled_from(shards))
    elif kind == "junk":
        weights[name] = draw(JUNK)
    elif kind == "drop":
        del weights[name]
    elif kind == "add":
        weights[draw(st.text(max_size=6))] = draw(st.sampled_from(shards) | JUNK)
    elif kind == "map":
        index["weight_map"] = draw(JUNK)
    elif kind == "order":
        weights[name] = weights.pop(name)
    raw = dump(index)
    if kind == "bytes":
        raw = mutate_bytes(draw, raw, len(raw))
    (directory / "model.safetensors.index.json").write_bytes(raw)
    if kind == "lost":
        victim = directory / draw(st.sampled_from(shards))
        shutil.move(victim, bench.path / "aside")
        try:
            bench.check(directory)
        finally:
            shutil.move(bench.path / "aside", victim)
    else:
        bench.check(directory)
