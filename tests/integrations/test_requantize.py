"""Requantising loaded models: which weights, which numbers, and that nothing else changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import DENSE, dense, logits, round_weights, some_tokens
from original import write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import microscale
from microscale import FORMATS, CheckpointError, FormatError, NoBackendError, dequantize, get_format, quantize
from microscale.integrations.hf.experts import dense_weights, experts_modules, read
from microscale.integrations.hf.requantize import dequantize_model, requantize
from microscale.integrations.hf.survey import Report, packable, survey, weights_of
from microscale.machine import detect
from microscale.nn import QuantLinear

# float32 all through: two orders of summation, a few layers deep, sums of a few hundred terms.
FP32_BOUND = 256 * 2.0**-24 * 8


@pytest.fixture
def tokens() -> Tensor:
    return some_tokens()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    write(path)
    return path


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return microscale.load(path, dtype=dtype, device="cpu", backend="emulation")


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("fmt", ["mxfp8_e4m3", "nvfp4", "fp8_block128"])
def test_a_dense_model_computes_with_the_rounded_weights(kind: str, fmt: str, tokens: Tensor) -> None:
    model = dense(kind)
    reference = copy.deepcopy(model)
    report = requantize(model, fmt, backend="emulation")
    round_weights(reference, fmt, [row.name for row in report.rows])
    wanted, found = logits(reference, tokens), logits(model, tokens)
    assert (found - wanted).abs().max() <= FP32_BOUND * wanted.abs().max()


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_packed_model_computes_with_the_rounded_weights(packed: Path, fmt: str, tokens: Tensor) -> None:
    model = load(packed)
    reference = dequantize_model(load(packed))
    report = requantize(model, fmt, backend="emulation")
    assert report.groups == ("experts", "linear")
    round_weights(reference, fmt, [row.name for row in report.rows])
    wanted, found = logits(reference, tokens), logits(model, tokens)
    assert (found - wanted).abs().max() <= FP32_BOUND * wanted.abs().max()


WIDER = [
    (name, rule)
    for name in ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8")
    for rule in get_format(name).rules
]


@pytest.mark.parametrize("fmt, rule", WIDER)
def test_what_holds_every_mxfp4_number_changes_none(packed: Path, fmt: str, rule: str) -> None:
    """Every code and, over all blocks, many scales: the checkpoint's bytes are random."""
    model, original = load(packed), load(packed)
    report = requantize(model, fmt, what=["experts"], rule=rule, backend="emulation")
    assert report.sqnr == math.inf
    for (_, ours), (_, theirs) in zip(experts_modules(model), experts_modules(original), strict=True):
        for new, old in zip(read(ours)[:2], read(theirs)[:2], strict=True):
            assert new.format.name == fmt
            got, wanted = dequantize(new), dequantize(old)
            if fmt == "mxint8":  # has no -0
                assert torch.equal(got, wanted)
            else:
                assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


def test_the_held_weights_are_those_that_quantize_gives() -> None:
    """Transposed experts included; a tensor scale for each expert."""
    model = dense("gpt_oss")
    wanted = {
        name: quantize(w, "nvfp4") for name, w in dense_weights(model.model.layers[1].mlp.experts).items()
    }
    requantize(model, "nvfp4", backend="emulation")
    for name, w in weights_of(model.model.layers[1].mlp.experts).items():
        for part in ("codes", "scales", "tensor_scale"):
            assert torch.equal(getattr(w, part), getattr(wanted[name], part))


def test_the_scale_rule_is_the_one_asked_for() -> None:
    model = dense("llama", intermediate_size=128)
    w = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    requantize(model, "mxfp4", rule="ceil", backend="emulation")
    scales = model.model.layers[0].mlp.up_proj.weight.scales
    assert torch.equal(scales, quantize(w, "mxfp4", rule="ceil").scales)
    assert not torch.equal(scales, quantize(w, "mxfp4").scales)


def test_the_report_adds_up(packed: Path) -> None:
    model, before = load(packed, torch.bfloat16), load(packed, torch.bfloat16)
    report = requantize(model, "mxfp8_e4m3", backend="emulation")
    old, new = dict(before.named_modules()), dict(model.named_modules())
    signal = noise = 0.0
    for row in report.rows:
        was, now = weights_of(old[row.name]), weights_of(new[row.name])
        assert row.weights == sum(math.prod(w.shape) for w in now.values())
        assert row.bytes_before == sum(w.nbytes for w in was.values())
        assert row.bytes_after == sum(w.nbytes for w in now.values()) == row.weights * 33 // 32
        for key, w in now.items():
            a = was[key].double() if isinstance(was[key], Tensor) else dequantize(was[key], torch.float64)
            signal += float((a**2).sum())
            noise += float(((a - dequantize(w, torch.float64)) ** 2).sum())
    assert report.sqnr == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
    assert report.bits_per_weight == 8.25
    parts = [report.of(group) for group in report.groups]
    for total in ("weights", "bytes_before", "bytes_after"):
        assert getattr(report, total) == sum(getattr(part, total) for part in parts)
    assert len(parts[0].rows) == 3  # experts of each layer
    assert len(parts[1].rows) == 3 * 4 + 1  # q, k, v, o and lm_head
    assert parts[0].sqnr == math.inf
    assert 25 < parts[1].sqnr < 40
    assert "13 modules" in str(report)


def test_a_survey_finds_what_is_packed_and_compares(packed: Path) -> None:
    model = load(packed)
    found = survey(model)
    assert {row.format for row in found.rows} == {"mxfp4"}
    assert len(found.rows) == 3
    reference = dequantize_model(load(packed))
    assert survey(model, reference).sqnr == math.inf
    reference.model.layers[0].mlp.experts.down_proj.data.mul_(1.01)
    assert survey(model, reference).sqnr < 60
    assert survey(reference) == Report(())
    with pytest.raises(CheckpointError, match="no such module"):
        survey(model, dense("llama"))
    with pytest.raises(CheckpointError, match="the reference differs"):
        survey(model, dense("gpt_oss", num_hidden_layers=3))


def names(report: Report) -> set[str]:
    return {row.name for row in report.rows}


def test_a_tied_head_and_routers_are_left_alone_unless_listed(tokens: Tensor) -> None:
    model = dense("qwen2_moe", tie_word_embeddings=True)
    found = names(requantize(model, "mxfp8_e4m3", backend="emulation"))
    assert "lm_head" not in found
    assert not any(name.endswith("gate") for name in found)
    assert "model.layers.0.mlp.shared_expert.gate_proj" in found
    listed = requantize(model, "mxfp8_e4m3", what=["lm_head", "*.shared_expert_gate"], backend="emulation")
    gates = {f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)}
    assert names(listed) == {"lm_head", *gates}
    assert isinstance(model.lm_head, QuantLinear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert torch.isfinite(logits(model, tokens)).all()


def test_what_is_ignored_stays_and_runs(tokens: Tensor) -> None:
    """One layer's experts stay dense beside another's packed ones."""
    model = dense("qwen3_moe")
    reference = copy.deepcopy(model)
    report = requantize(model, "mxfp4", ignore=["layers.0", "o_proj", "lm_head"], backend="emulation")
    assert names(report) == {
        f"model.layers.1.{n}" for n in ("mlp.experts", *(f"self_attn.{x}_proj" for x in "qkv"))
    }
    round_weights(reference, "mxfp4", list(names(report)))
    wanted = logits(reference, tokens)
    assert (logits(model, tokens) - wanted).abs().max() <= FP32_BOUND * wanted.abs().max()


def test_again_and_back_to_dense(packed: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = load(packed)
    requantize(model, "mxfp8_e4m3", what=["experts"], backend="emulation")
    requantize(model, "mxfp4", what=["experts"], backend="emulation")
    original = load(packed)
    assert torch.equal(logits(model, tokens), logits(original, tokens))
    requantize(model, "mxfp6_e2m3", backend="emulation")
    packed_logits = logits(model, tokens)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    dequantize_model(model)
    assert survey(model) == Report(())
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    wanted = logits(model, tokens)
    assert (packed_logits - wanted).abs().max() <= FP32_BOUND * wanted.abs().max()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    again.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(logits(again, tokens), wanted)


def test_dequantised_numbers_are_rounded_once_to_the_models_dtype(packed: Path) -> None:
    model = load(packed, torch.bfloat16)
    requantize(model, "nvfp4", backend="emulation")
    held = [dequantize(w, torch.bfloat16) for _, m, _ in packable(model) for w in weights_of(m).values()]
    dequantize_model(model)
    found = [w for _, m, _ in packable(model) for w in weights_of(m).values()]
    assert all(torch.equal(a, b) for a, b in zip(found, held, strict=True))
    assert {w.dtype for w in found} == {torch.bfloat16}


def test_activations_are_quantised_when_asked(packed: Path, tokens: Tensor) -> None:
    plain, coarse = load(packed), load(packed)
    requantize(plain, "mxfp4", backend="emulation")
    requantize(coarse, "mxfp4", act="a4", backend="emulation")
    assert coarse.lm_head.act is FORMATS["mxfp4"]
    assert coarse.model.layers[0].mlp.experts.microscale.act is FORMATS["mxfp4"]
    assert not torch.equal(logits(plain, tokens), logits(coarse, tokens))


def test_layers_are_placed_and_progress_sees_them(packed: Path) -> None:
    model, seen = load(packed), []

    def watch(items: Any) -> Any:
        for item in items:
            seen.append(item[0])
            yield item

    report = microscale.requantize(model, "mxint8", progress=watch)
    assert seen == [row.name for row in report.rows]
    assert model.lm_head.placement.proof.startswith("canary passed")
    assert model.model.layers[2].mlp.experts.microscale.placement.proof.startswith("canary passed")


def test_what_takes_packed_weights_for_a_tensor_is_told() -> None:
    model = dense("llama")
    requantize(model, "mxfp4", what=["lm_head"], backend="emulation")
    with pytest.raises(microscale.PackedError, match=r"no 'size'.*resize_token_embeddings.* before"):
        model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    weight = model.lm_head.weight
    assert not hasattr(weight, "size")
    assert not hasattr(weight, "no_such_word")
    with pytest.raises(AttributeError, match="QuantTensor has no attribute 'no_such_word'"):
        _ = weight.no_such_word
    twin = copy.deepcopy(weight)
    assert torch.equal(twin.codes, weight.codes)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "format": ({"fmt": "mxfp5"}, FormatError, "unknown format 'mxfp5'; known: mxfp4"),
    "rule": ({"rule": "up"}, FormatError, "unknown scale rule 'up' for mxfp4; known: even"),
    "act": ({"act": "a5"}, FormatError, "unknown format 'a5'"),
    "pattern": ({"what": ["experts", "*.w1"]}, CheckpointError, r"'\*.w1' matches no experts or nn.Linear"),
    "ignore": ({"ignore": ["lm_haed"]}, CheckpointError, "'lm_haed' matches no module"),
    "router": ({"what": ["*.mlp.gate"]}, CheckpointError, "matches no experts or nn.Linear"),
    "nothing": ({"ignore": ["model", "lm_head"]}, CheckpointError, "nothing to quantise"),
    "string": ({"what": "experts"}, CheckpointError, "not one string"),
    "backend": ({"backend": "abacus"}, NoBackendError, "no backend has this name; known: cpu"),
    "of experts": ({"backend": "abacus", "what": ["experts"]}, NoBackendError, "no backend has this name"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_leave_the_model_as_it_was(case: str, tokens: Tensor) -> None:
    options, error, message = BAD[case]
    options = {"fmt": "mxfp4", **options}
    model = dense("qwen3_moe")
    wanted = logits(model, tokens)
    with pytest.raises(error, match=message):
        requantize(model, **options)
    assert torch.equal(logits(model, tokens), wanted)
    assert survey(model) == Report(())


@pytest.mark.parametrize("what", ["experts", "linear"])
def test_what_is_converted_in_part_is_not_saved(tmp_path: Path, tokens: Tensor, what: str) -> None:
    """Its packed parts would have names that no loader reads."""
    model = dense("qwen3_moe")

    def interrupted(chosen: Iterable[Any]) -> Iterator[Any]:
        yield next(iter(chosen))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        requantize(model, "mxfp8_e4m3", what=[what], progress=interrupted)
    assert torch.isfinite(logits(model, tokens)).all()
    with pytest.raises(ValueError, match="microscale mxfp8_e4m3"):
        model.save_pretrained(tmp_path)


def test_a_row_of_part_blocks_is_refused_by_name_before_anything_changes() -> None:
    model = dense("llama", intermediate_size=80)
    message = r"model.layers.0.mlp.down_proj: mxfp4 stores blocks of 32 along K, and K = 80 is no multiple"
    with pytest.raises(FormatError, match=message):
        requantize(model, "mxfp4")
    assert survey(model) == Report(())
    requantize(model, "mxfp4", ignore=["down_proj"], backend="emulation")
    requantize(model, "fp8_block128", backend="emulation")  # defines what the last block is


def test_experts_that_end_in_a_norm_are_refused() -> None:
    model = dense("qwen3_moe")
    model.model.layers[1].mlp.experts.has_post_expert_norm = True
    with pytest.raises(CheckpointError, match="end in a norm"):
        requantize(model, "mxfp4")
    assert survey(model) == Report(())


@pytest.mark.parametrize("backend", ["emulation", "cpu"])
@pytest.mark.parametrize("fmt", ["nvfp4", "fp8_block128"])
def test_a_change_of_dtype_rounds_no_scale(fmt: str, backend: str, tokens: Tensor) -> None:
    if backend == "cpu" and not detect().core:
        pytest.skip(detect().core_missing)
    model = dense("qwen3_moe").to(torch.float16).to(torch.float32)  # else a router's rounding moves routes
    requantize(model, fmt, what=("experts",), backend=backend)
    experts = model.model.layers[1].mlp.experts
    before = read_back(experts)
    expected = logits(model, tokens)
    model.to(torch.float16).to(torch.float32)
    assert all(map(torch.equal, read_back(experts), before))
    assert torch.equal(logits(model, tokens), expected)


def read_back(experts: nn.Module) -> list[Tensor]:
    """The float32 parts of an experts module's weights, as its runner gives them."""
    parts = [t for w in experts.microscale.weights[:2] for t in (w.scales, w.tensor_scale)]  # type: ignore[union-attr]
    return [t.clone() for t in parts if t is not None]
