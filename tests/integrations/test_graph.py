"""Steps over a cache that stays in place, and their capture: real graphs on CUDA, elsewhere a stand-in for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from step_models import DEVICE, MODELS, anywhere, eager, gpt_oss, mistral, prompt, qwen  # noqa: F401 (a fixture for all tests)
from transformers import (
    BloomConfig,
    BloomForCausalLM,
)

import microscale
from microscale.integrations.hf import graph
from microscale.integrations.hf import step as step_module
from microscale.integrations.hf.graph import Decoder, capacity_for, refuse_model
from microscale.integrations.hf.step import capture as real_capture
from microscale.integrations.hf.step_cache import StepCache


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_tokens_are_those_of_transformers(tmp_path: Path, make: Callable[[Path], Any], batch: int) -> None:
    model = make(tmp_path)
    decoder = Decoder(model)
    for length, new in (
        (5, 20),
        (8, 9),
        (1, 30),
        (43, 12),
        (7, 4),
    ):  # a window fills on the way, before, never
        ids = prompt(batch, length)
        with torch.inference_mode():
            found = decoder.generate(ids, new, attention_mask=torch.ones_like(ids))
        assert decoder.why is None
        assert torch.equal(found, eager(model, ids, new)), (length, new)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_logits_of_each_step_are_those_without_a_cache(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    model, ids = make(tmp_path), prompt(2, 30)
    cache = StepCache(model.config, 32, model.device)
    step = step_module.Step(model, cache, 2)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :3], past_key_values=cache).logits
        cache.start(3)
        assert torch.equal(first, model(ids[:, :3]).logits), "a prompt must not notice the cache"
        for t in range(3, 30):
            found = step(ids[:, t : t + 1]).logits[:, 0]
            assert (found - whole[:, t]).abs().max() <= 1e-4 * whole.abs().max(), t
        assert step.captured, step.why
        step(ids[:, :1])
        step(ids[:, :1])
        with pytest.raises(IndexError, match="room for 32 tokens"):
            step(ids[:, :1])


def test_a_step_is_kept_for_the_next_prompt(tmp_path: Path) -> None:
    decoder = Decoder(qwen(tmp_path))
    ids = prompt(1, 6)
    first = decoder.generate(ids, 10)
    step = decoder._step
    decoder._cache.layers[0].keys.fill_(float("nan"))  # what an earlier prompt left is not looked at
    assert torch.equal(decoder.generate(ids, 10), first)
    decoder.generate(prompt(1, 30), 100)
    assert decoder._step is step
    decoder.generate(prompt(1, 30), 2)
    assert decoder.why is None, "it was captured before"
    decoder.generate(prompt(2, 6), 10)
    assert decoder._step is not step, "it is for another batch"
    step = decoder._step
    decoder.generate(prompt(2, 250), 10)
    assert decoder._step is not step, "its cache is too small"
    step = decoder._step
    flipped = decoder.model.lm_head.register_forward_hook(lambda module, given, found: found.flip(-1))
    decoder.generate(prompt(2, 250), 10)
    assert decoder._step is not step, "its modules compute something else"
    flipped.remove()
    step = decoder._step
    microscale.requantize(decoder.model, "mxfp4")
    ids = prompt(2, 250)
    found = decoder.generate(ids, 10)
    assert decoder._step is not step, "it reads other weights"
    assert torch.equal(found, eager(decoder.model, ids, 10))


@pytest.mark.parametrize("make", [gpt_oss, mistral], ids=lambda make: make.__name__)
def test_a_step_that_was_launched_ahead_is_taken_back(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    """Windows that are full as well: what the wrong token left in the ring is overwritten."""
    model, ids = make(tmp_path), prompt(2, 30)
    found = []
    for greedy in (False, True):
        cache = StepCache(model.config, 32, model.device)
        step = step_module.Step(model, cache, 2)
        step.greedy = greedy
        with torch.no_grad():
            model(ids[:, :3], past_key_values=cache)
            cache.start(3)
            logits, token = [], ids[:, 3:4]
            for t in range(3, 30):
                logits.append(step(token).logits.clone())
                likeliest = logits[-1][:, -1].argmax(-1, keepdim=True)
                token = likeliest if t % 3 else ids[:, t : t + 1]
            step.finish()
        ahead = step._ahead
        assert ahead is not None
        assert not ahead.pending
        assert cache.position.item() == 30 + greedy, "the last one was launched, too"
        assert (5 <= ahead.missed <= 8) == greedy, ahead.missed
        found.append(torch.stack(logits))
    assert torch.equal(*found)


def test_sampling_takes_the_same_path(tmp_path: Path) -> None:
    model, ids = gpt_oss(tmp_path), prompt(2, 5)
    decoder, options = Decoder(model), {"do_sample": True, "temperature": 2.0, "max_new_tokens": 20}
    torch.manual_seed(3)
    wanted = model.generate(ids, **options)
    torch.manual_seed(3)
    assert torch.equal(decoder.generate(ids, **options), wanted)
    assert decoder.why is None


def test_what_cannot_be_captured_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = gpt_oss(tmp_path), prompt(1, 5)
    wanted = eager(model, ids, 12)

    def fails(run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(step_module, "capture", fails)
    decoder = Decoder(model)
    for _ in range(2):
        assert torch.equal(decoder.generate(ids, 12), wanted)
        assert decoder.why == (
            "its step cannot be captured: RuntimeError: operation not permitted when stream is capturing"
        )


def test_a_step_that_is_not_the_same_each_time_is_not_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = gpt_oss(tmp_path), prompt(1, 5)
    wanted, real = eager(model, ids, 12), step_module.capture

    def stale(run: Callable[[], Any]) -> Any:
        replay, output = real(run)

        def wrong() -> None:
            replay()
            output.logits.add_(1)

        return wrong, output

    monkeypatch.setattr(step_module, "capture", stale)
    decoder = Decoder(model)
    decoder.generate(ids, 12)
    assert decoder.why == "its captured step gave other logits than the step itself"
    assert torch.equal(decoder.generate(ids, 12), wanted)


def test_a_graph_that_holds_nothing_is_not_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would be whose kernels went elsewhere: they ran while it was captured, and a replay moves nothing."""

    def nothing(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        output = run()
        return lambda: None, output

    monkeypatch.setattr(step_module, "capture", nothing)
    model, ids = mistral(tmp_path), prompt(1, 5)
    decoder = Decoder(model)
    assert torch.equal(decoder.generate(ids, 12), eager(model, ids, 12))
    assert decoder.why == "its captured step gave other logits than the step itself"


def test_steps_are_made_on_the_gpu_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = graph.on_device(torch.device("cuda:1"))
    assert isinstance(second, torch.cuda.device)
    assert second.idx == 1
    model, seen, inside = qwen(tmp_path), [], [False]

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        seen.append(device)
        inside[0] = True
        yield
        inside[0] = False

    captured, ended = step_module.capture, []

    def capture(run: Callable[[], Any]) -> Any:
        assert inside[0]
        return captured(run)

    monkeypatch.setattr(graph, "on_device", on_device)
    monkeypatch.setattr(step_module, "capture", capture)
    monkeypatch.setattr(step_module.Step, "finish", lambda step: ended.append(inside[0]))
    decoder = Decoder(model)
    decoder.generate(prompt(1, 5), 6)
    assert decoder.why is None
    assert seen == [model.device]
    assert ended == [True]


def test_a_capture_has_a_stream_of_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one there has the same."""
    streams = []

    @contextmanager
    def recorded(graph: Any, stream: Any = None) -> Iterator[None]:
        streams.append(stream)
        yield

    now = [0]
    monkeypatch.setattr(step_module, "_stream", cache(lambda device: [device]))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    for now[0] in (0, 1, 0):
        assert real_capture(lambda: 7)[1] == 7
    assert streams == [[0], [1], [0]]
    assert streams[0] is streams[2]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = gpt_oss(tmp_path), prompt(2, 5)
    decoder = Decoder(model, graph=False)
    wanted = eager(model, ids, 5)
    assert torch.equal(decoder.generate(ids, 5), wanted)
    assert decoder.why == "replaying steps is switched off"

    decoder = Decoder(model)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    decoder.generate(ids, 5, attention_mask=mask)
    assert "padded" in str(decoder.why)
    decoder.generate(ids, 5, num_beams=2)
    assert "num_beams was given" in str(decoder.why)
    decoder.generate(ids, 2)
    assert decoder.why == "two steps run before one is replayed"
    assert torch.equal(decoder.generate(ids, 5), wanted)
    assert decoder.why is None
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    decoder.generate(ids, 5)
    assert "num_beams = 3" in str(decoder.why)

    assert refuse_model(model) is None
    changed = copy.deepcopy(model)
    changed.config.layer_types = ["linear_attention"] * 3
    assert "linear_attention" in str(refuse_model(changed))
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    assert "flash_attention_2" in str(refuse_model(model))


def test_models_that_prepare_their_own_inputs_are_refused() -> None:
    config = BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64)
    assert "in a way of its own" in str(refuse_model(BloomForCausalLM(config)))


def test_capacities_grow_in_steps() -> None:
    assert [capacity_for(n) for n in (1, 256, 257, 2048, 2112, 100_000)] == [
        256,
        256,
        512,
        2048,
        2560,
        114_688,
    ]
    for n in range(1, 70_000, 997):
        assert n <= capacity_for(n) <= max(256, 1.25 * n + 256)
        assert capacity_for(capacity_for(n)) == capacity_for(n)


def test_a_cache_that_would_fill_the_gpu_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = gpt_oss(tmp_path), prompt(1, 5)
    decoder = Decoder(model)
    wanted = eager(model, ids, 5)
    monkeypatch.setattr(type(model), "device", SimpleNamespace(type="cuda"))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000, 1 << 30))
    assert "GB at once, and 0.0 GB are free" in str(decoder._refuse_room(1, 1 << 16))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    assert decoder._refuse_room(1, 1 << 16) is None
    monkeypatch.undo()
    assert torch.equal(wanted, eager(model, ids, 5))


def test_other_devices_have_no_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = gpt_oss(tmp_path)
    monkeypatch.setattr(type(model), "device", SimpleNamespace(type="xpu"))
    assert Decoder(model).why == "CUDA graphs are for CUDA, and the model is on xpu"
