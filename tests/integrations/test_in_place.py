"""Generations of one model that run at once, one within another, or are cut off."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cpu_step import eager, llama, mistral, prompt

from microscale.integrations.hf.cpu_cache import TokenCache
from microscale.integrations.hf.graph import Decoder


@pytest.mark.parametrize("decoders", [1, 4])
def test_threads_generate_at_once(tmp_path: Path, decoders: int) -> None:
    model = llama(tmp_path)
    made = [Decoder(model) for _ in range(decoders)]
    prompts = [prompt(1, 4 + i) for i in range(4)]
    wanted = [eager(model, ids, 60) for ids in prompts]

    def generate(i: int) -> list[torch.Tensor]:
        return [made[i % decoders].generate(prompts[i], 60) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        for found, want in zip(pool.map(generate, range(4)), wanted, strict=True):
            assert all(torch.equal(ids, want) for ids in found)
    assert not {"forward", "prepare_inputs_for_generation"} & set(model.__dict__)
    assert torch.equal(made[0].generate(prompts[0], 60), wanted[0])
    assert made[0].fused


class Streamer:
    """Calls somebody at the nth token."""

    def __init__(self, at: int, call: Any) -> None:
        self.left, self.call = at, call

    def put(self, _: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            self.call()

    def end(self) -> None:
        pass


def test_a_streamer_generates(tmp_path: Path) -> None:
    model, ids = llama(tmp_path), prompt(1, 5)
    decoder, wanted = Decoder(model), eager(model, ids, 20)
    for inner in (decoder, Decoder(model)):
        other, within = prompt(1, 7), []
        streamer = Streamer(
            6, lambda inner=inner, other=other, within=within: within.append(inner.generate(other, 9))
        )
        assert torch.equal(decoder.generate(ids, 20, streamer=streamer), wanted)
        assert decoder.fused
        assert torch.equal(within[0], eager(model, other, 9))
    assert "forward" not in model.__dict__


def test_a_generation_is_interrupted(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    model, ids = llama(tmp_path), prompt(1, 5)
    decoder, wanted = Decoder(model), eager(model, ids, 20)
    for at in (1, 2, 9):
        with pytest.raises(KeyboardInterrupt):
            decoder.generate(ids, 20, streamer=Streamer(at, interrupt))
        assert "forward" not in model.__dict__
        assert torch.equal(decoder.generate(ids, 20), wanted)
        assert decoder.fused


def test_a_cache_that_could_not_grow_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = mistral(tmp_path), prompt(1, 5)
    cache = TokenCache(model.config, 6, model.device)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.start(5)
    before = [(layer.keys, layer.slots) for layer in cache.steps]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", no_memory)
        with pytest.raises(RuntimeError, match="no memory"):
            cache.grow()
    assert cache.capacity == 6
    assert [(layer.keys, layer.slots) for layer in cache.steps] == before
    cache.grow()
    assert [layer.slots for layer in cache.steps] == [8, 8, 8]
    assert cache.capacity == 12


def no_memory(*_: Any, **__: Any) -> None:
    raise RuntimeError("no memory")
