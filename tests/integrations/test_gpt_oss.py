"""Our packed gpt-oss against transformers' own classes and MXFP4 arithmetic: same logits, same greedy tokens."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from original import write
from transformers import AutoModelForCausalLM, Mxfp4Config

import microscale
from microscale.checkpoints import Source, strict
from microscale.errors import CheckpointError, NoBackendError
from microscale.integrations.hf.quantizer import runners
from microscale.machine import detect

# float32 all through: two orders of summation, three layers deep. Each sum has at most a few hundred terms.
FP32_BOUND = 256 * 2.0**-24 * 8


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits.double()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(2, 160, (2, 40))


def test_float32_logits_and_greedy_tokens_equal_transformers(tmp_path: Path, tokens: torch.Tensor) -> None:
    reference = write(tmp_path)
    ours = microscale.load(tmp_path, dtype=torch.float32, device="cpu")
    wanted, found = logits(reference, tokens), logits(ours, tokens)
    assert (found - wanted).abs().max() <= FP32_BOUND * wanted.abs().max()
    options = {"max_new_tokens": 24, "do_sample": False}
    assert torch.equal(ours.generate(tokens, **options), reference.generate(tokens, **options))


def test_bf16_logits_are_no_worse_than_those_of_the_dequantised_model(
    tmp_path: Path, tokens: torch.Tensor
) -> None:
    """Both round to bf16 in every layer; what each loses against float32 is the yardstick.

    Of the median token: where rounding flips a route, either model may lose much more. Over seeds the ratio is 0.92
    with a standard deviation of 0.09.
    """
    reference = write(tmp_path)
    wanted = logits(reference, tokens)
    dense = copy.deepcopy(reference).bfloat16()
    ours = microscale.load(tmp_path, device="cpu")
    assert ours.dtype == torch.bfloat16
    lost = [(logits(m, tokens) - wanted).abs().mean(dim=-1).median() for m in (ours, dense)]
    assert lost[0] <= 1.5 * lost[1]


def test_plain_from_pretrained_is_the_same_model(tmp_path: Path, tokens: torch.Tensor) -> None:
    write(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    eager = microscale.load(tmp_path, device="cpu", attn_implementation="eager")
    assert torch.equal(logits(plain, tokens), logits(eager, tokens))
    packed = dict(plain.named_parameters())
    for name in ("gate_up_proj", "down_proj"):
        assert packed[f"model.layers.0.mlp.experts.{name}_blocks"].dtype == torch.uint8
        assert f"model.layers.0.mlp.experts.{name}" not in packed
    backend = "cpu" if detect().core else "emulation"
    assert [r.placement.choice.backend.name for _, r in runners(plain)] == [backend] * 3


def test_load_is_ours_where_from_pretrained_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with MICROSCALE_TRANSFORMERS=off when microscale is imported."""
    from transformers.quantizers import auto

    write(tmp_path)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "mxfp4", auto.Mxfp4HfQuantizer)
    assert runners(microscale.load(tmp_path, device="cpu"))
    assert auto.AUTO_QUANTIZER_MAPPING["mxfp4"] is auto.Mxfp4HfQuantizer


def test_asking_transformers_to_dequantise_still_works(tmp_path: Path) -> None:
    reference = write(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Mxfp4Config(dequantize=True))
    for ours, theirs in zip(dense.model.layers, reference.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):  # bf16 holds every MXFP4 number
            found, wanted = getattr(ours.mlp.experts, name), getattr(theirs.mlp.experts, name)
            assert torch.equal(found.float(), wanted)


def test_tied_embeddings(tmp_path: Path, tokens: torch.Tensor) -> None:
    reference = write(tmp_path, tie_word_embeddings=True)
    reference.tie_weights()
    wanted = logits(reference, tokens)
    found = logits(microscale.load(tmp_path, dtype=torch.float32, device="cpu"), tokens)
    assert (found - wanted).abs().max() <= FP32_BOUND * wanted.abs().max()


def test_saving_gives_the_checkpoint_back(tmp_path: Path) -> None:
    write(tmp_path / "a")
    microscale.load(tmp_path / "a", device="cpu").save_pretrained(tmp_path / "b")
    ours, again = (microscale.checkpoints.open_checkpoint(tmp_path / d) for d in "ab")
    assert sorted(ours.source.names()) == sorted(again.source.names())
    for name in ours.source.names():
        assert torch.equal(ours.source.tensor(name), again.source.tensor(name)), name


def test_activations_in_eight_bits_differ_and_stay_close(tmp_path: Path, tokens: torch.Tensor) -> None:
    reference = logits(write(tmp_path), tokens)
    errors = {}
    for act in ("a16", "a8", "a6", "a4"):
        model = microscale.load(tmp_path, dtype=torch.float32, device="cpu", act=act)
        # The median token: one whose route flips says nothing about the width of its activations.
        errors[act] = float((logits(model, tokens) - reference).abs().mean(dim=-1).median())
    assert errors["a16"] < errors["a8"] < errors["a4"]
    assert errors["a16"] < errors["a6"] < errors["a4"]
    assert errors["a8"] < 0.2 * float(reference.std())


def test_a_moved_model_is_placed_again(tmp_path: Path, tokens: torch.Tensor) -> None:
    write(tmp_path)
    model = microscale.load(tmp_path, device="cpu")
    before = logits(model, tokens)
    assert torch.equal(logits(model.to("cpu"), tokens), before)
    assert torch.equal(logits(copy.deepcopy(model), tokens), before)


def test_adapters_beside_packed_experts_get_gradients(tmp_path: Path, tokens: torch.Tensor) -> None:
    write(tmp_path)
    model = microscale.load(tmp_path, device="cpu")
    model(tokens, labels=tokens).loss.backward()
    grad = model.model.layers[0].self_attn.q_proj.weight.grad
    assert grad is not None
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0


def test_forced_backend_that_refuses(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(NoBackendError, match="triton: Triton compiles for CUDA, ROCm and XPU, not for cpu"):
        microscale.load(tmp_path, device="cpu", backend="triton")


@pytest.mark.parametrize(
    "load", [microscale.load, AutoModelForCausalLM.from_pretrained], ids=["load", "plain"]
)
def test_a_checkpoint_that_lies_is_refused_on_both_ways_in(tmp_path: Path, load: Any) -> None:
    write(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_local_experts": 4', '"num_local_experts": 5'))
    with pytest.raises(CheckpointError, match=r"expected .*5.*found .*4"):
        load(tmp_path)


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": 3}])
def test_an_index_without_metadata_is_named(
    tmp_path: Path, metadata: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    names = dict.fromkeys(Source.open(tmp_path).names(), "one.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names, **metadata}))
    with pytest.raises(CheckpointError, match=r"index.json: metadata, .* .expected an object"):
        microscale.load(tmp_path)
    index.write_text(json.dumps({"weight_map": names, "metadata": {}}))
    parsed, parse = [], strict.parse_object
    monkeypatch.setattr(
        strict, "parse_object", lambda path, *args, **how: parsed.append(path) or parse(path, *args, **how)
    )
    assert runners(microscale.load(tmp_path, device="cpu"))
    assert parsed.count(index) == 1, "an index may have 100 MB"


def test_config_alone_says_how_to_try_it() -> None:
    with pytest.raises(CheckpointError, match="--load-format dummy"):
        microscale.load("gpt-oss-20b")


def test_dummy_weights_in_true_shapes() -> None:
    from microscale.integrations.hf.dummy import dummy_config, meta_model
    from microscale.models import resolve

    path = resolve("gpt-oss-20b")
    cut = dummy_config(path, microscale.checkpoints.read_config(path), 2)
    shapes = {name: tuple(p.shape) for name, p in meta_model(cut, path).named_parameters()}
    assert shapes["model.layers.1.mlp.experts.gate_up_proj_blocks"] == (32, 5760, 90, 16)
    assert shapes["model.layers.1.mlp.experts.down_proj_scales"] == (32, 2880, 90)
    assert shapes["model.embed_tokens.weight"] == (201088, 2880)
    assert not any(name.startswith("model.layers.2") for name in shapes)


def test_dummy_of_the_bundled_architecture_runs(tmp_path: Path) -> None:
    write(tmp_path)
    model = microscale.load(tmp_path, load_format="dummy", layers=2, device="cpu")
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 6)
    with pytest.raises(CheckpointError, match="expected 1 to 3, found 9"):
        microscale.load(tmp_path, load_format="dummy", layers=9)


def test_a_traced_model_computes_when_it_is_replayed(tmp_path: Path) -> None:
    """A tracer sees operators of torch's only, and has tensors for sizes."""
    write(tmp_path)
    model = microscale.load(tmp_path, dtype=torch.float32, device="cpu")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> Any:
            return self.model(ids, use_cache=False).logits

    run = Logits().eval()
    seen, other = torch.randint(2, 160, (2, 1, 7))
    with torch.no_grad():
        found, wanted = torch.jit.trace(run, seen, check_trace=False)(other), run(other)
    assert (found - wanted).abs().max() <= FP32_BOUND * wanted.abs().max()


def test_threads_load_at_once() -> None:
    """In a process of its own, which has imported nothing yet."""
    code = """
from concurrent.futures import ThreadPoolExecutor
import microscale
with ThreadPoolExecutor(4) as pool:
    models = list(pool.map(lambda _: microscale.load("stdlib-moe", device="cpu"), range(4)))
first = models[0].state_dict()
assert all(t.equal(m.state_dict()[name]) for m in models for name, t in first.items())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "PYTHONPATH": str(Path(microscale.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
