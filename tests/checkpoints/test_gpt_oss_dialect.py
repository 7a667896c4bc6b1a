"""The gpt-oss MXFP4 layout: read, written, and refused by name when anything about it is off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIG, config, gpt_oss_state, peak_rss_kib, raw_bytes
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.checkpoints import Checkpoint, Entry, gpt_oss, open_checkpoint, write
from microscale.errors import CheckpointError
from microscale.quant import QuantTensor, dequantize, quantize

EXPERTS = "model.layers.1.mlp.experts"
BLOCKS, SCALES = f"{EXPERTS}.gate_up_proj_blocks", f"{EXPERTS}.gate_up_proj_scales"


def make(path: Path, cfg: dict[str, Any] | None = None, state: dict[str, Tensor] | None = None) -> Path:
    write(path, cfg or CONFIG, state or gpt_oss_state())
    return path


def refused(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as info:
        open_checkpoint(path)
    return info.value


def find(c: Checkpoint, module: str, role: str) -> Entry:
    (entry,) = [e for e in c.groups if (e.module, e.role) == (module, role)]
    return entry


def test_every_tensor_is_in_one_entry(tmp_path: Path) -> None:
    state = gpt_oss_state()
    c = open_checkpoint(make(tmp_path / "m", state=state))
    assert (c.dialect, c.config, c.path) == ("gpt_oss", CONFIG, tmp_path / "m")
    assert sorted(n for e in c.groups for n in e.tensors) == sorted(state)
    assert {(e.role, e.shape) for e in c.groups if e.format == "mxfp4"} == {
        ("w13", (3, 64, 64)),
        ("w2", (3, 64, 32)),
    }
    assert find(c, EXPERTS, "w13_bias").shape == (3, 64)
    assert find(c, EXPERTS, "w2_bias").tensors == (f"{EXPERTS}.down_proj_bias",)
    assert find(c, "model.layers.0.self_attn", "sinks").shape == (4,)
    assert find(c, "lm_head", "weight") == Entry("lm_head", "weight", None, ("lm_head.weight",), (40, 64))


def test_round_trip_is_bit_exact_and_zero_copy(tmp_path: Path) -> None:
    state = gpt_oss_state()
    write(tmp_path / "m", CONFIG, state, max_shard_bytes=30_000)
    c = open_checkpoint(tmp_path / "m")
    again: dict[str, Tensor] = {}
    for e in c.groups:
        t = c.load(e)
        if isinstance(t, QuantTensor):
            assert (t.shape, t.rule) == (e.shape, None)
            assert t.codes.data_ptr() == c.source.tensor(e.tensors[0]).data_ptr()
            assert t.scales.data_ptr() == c.source.tensor(e.tensors[1]).data_ptr()
            again |= gpt_oss.store(e, t)
        else:
            again[e.tensors[0]] = t
    assert again.keys() == state.keys()
    assert all(raw_bytes(again[n]) == raw_bytes(state[n]) and again[n].shape == state[n].shape for n in state)
    write(tmp_path / "again", c.config, {n: again[n] for n in state}, max_shard_bytes=30_000)
    for file in sorted((tmp_path / "m").iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_numbers_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    state = gpt_oss_state()
    c = open_checkpoint(make(tmp_path / "m", state=state))
    w13 = c.load(find(c, EXPERTS, "w13"))
    assert isinstance(w13, QuantTensor)
    theirs = convert_moe_packed_tensors(state[BLOCKS], state[SCALES], dtype=torch.float32)  # [E, H, 2I]
    assert torch.equal(dequantize(w13), theirs.transpose(1, 2))


def test_quantised_here_reads_back(tmp_path: Path) -> None:
    state = gpt_oss_state()
    q = quantize(torch.randn(3, 64, 64), "mxfp4")
    entry = gpt_oss.packed_entry(EXPERTS, "w13", (3, 64, 64))
    c = open_checkpoint(make(tmp_path / "m", state=state | gpt_oss.store(entry, q)))
    got = c.load(entry)
    assert isinstance(got, QuantTensor)
    assert torch.equal(got.codes, q.codes)
    assert torch.equal(got.scales, q.scales)
    with pytest.raises(CheckpointError, match="cannot store"):
        gpt_oss.store(entry, quantize(torch.randn(3, 64, 32), "mxfp4"))
    with pytest.raises(CheckpointError, match="cannot store"):
        gpt_oss.store(entry, quantize(torch.randn(3, 64, 64), "mxfp8_e4m3"))


def test_packed_linears(tmp_path: Path) -> None:
    packed = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.router", "lm_head")
    cfg = config(
        quantization_config={"quant_method": "mxfp4"}
    )  # lists nothing: the others are 16-bit all the same
    c = open_checkpoint(make(tmp_path / "m", cfg, gpt_oss_state(packed_linears=packed)))
    assert {e.module for e in c.groups if e.format and e.role == "weight"} == set(packed)
    q = c.load(find(c, packed[0], "weight"))
    assert isinstance(q, QuantTensor)
    assert q.shape == (64, 64)
    assert find(c, "model.layers.1.self_attn.q_proj", "weight").format is None


@pytest.mark.parametrize(
    ("module", "patterns", "covered"),
    [
        ("model.layers.0.self_attn.q_proj", ["model.layers.*.self_attn"], True),
        ("model.layers.0.self_attn.q_proj", ["model.layers.1.self_attn"], False),
        ("model.layers.0.self_attn.q_proj", ["self_attn"], True),
        ("model.layers.0.self_attn.q_proj", ["q_proj"], True),
        ("model.layers.0.self_attn.q_proj", ["model"], True),
        ("model.layers.0.self_attn.q_proj", ["proj", "attn", "lm_head", "model.layers.0.self"], False),
        ("lm_head", ["lm_head"], True),
        ("lm_head", ["lm_*"], True),
        ("lm_head", [], False),
        (
            "lm_head",
            ["[", "[!", "[[:x", "***", "(", "\\"],
            True,
        ),  # "***" is everything; the rest must not raise
        ("lm_head", ["[", "[!", "[[:x", "(", "\\"], False),
    ],
)
def test_modules_to_not_convert(tmp_path: Path, module: str, patterns: list[str], covered: bool) -> None:
    cfg = config(quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": patterns})
    make(tmp_path / "m", cfg, gpt_oss_state(packed_linears=(module,)))
    if "***" in patterns:
        refused(tmp_path / "m", "modules_to_not_convert lists its module")
    elif covered:
        error = refused(tmp_path / "m", "is packed, but modules_to_not_convert lists its module")
        assert error.tensor == f"{module}.weight_blocks"
    else:
        open_checkpoint(tmp_path / "m")


Change = Callable[[dict[str, Tensor]], object]
DOWN_BIAS, SINKS, NORM = f"{EXPERTS}.down_proj_bias", "model.layers.0.self_attn.sinks", "model.norm.weight"
BEYOND, FLOAT = "model.layers.2.self_attn.sinks", f"{EXPERTS}.gate_up_proj"
STATES: list[tuple[str, Change, str, str]] = [
    ("no scales", lambda s: s.pop(SCALES), SCALES, "missing"),
    ("no blocks", lambda s: s.pop(BLOCKS), BLOCKS, "missing"),
    ("neither", lambda s: (s.pop(BLOCKS), s.pop(SCALES)), BLOCKS, "missing: quant_method says mxfp4"),
    ("no bias", lambda s: s.pop(DOWN_BIAS), DOWN_BIAS, "missing"),
    ("no sinks", lambda s: s.pop(SINKS), SINKS, "missing"),
    ("no head", lambda s: s.pop("lm_head.weight"), "lm_head.weight", "missing"),
    (
        "two experts",
        lambda s: s.update({BLOCKS: s[BLOCKS][:2]}),
        BLOCKS,
        r"\[3, 64, 2, 16\], found \[2, 64, 2, 16\]",
    ),
    (
        "scales of two",
        lambda s: s.update({SCALES: s[SCALES][:2]}),
        SCALES,
        r"\[3, 64, 2\], found \[2, 64, 2\]",
    ),
    ("rank", lambda s: s.update({BLOCKS: s[BLOCKS].flatten(-2)}), BLOCKS, r"found \[3, 64, 32\]"),
    ("transposed", lambda s: s.update({SCALES: s[SCALES].mT}), SCALES, r"found \[3, 2, 64\]"),
    ("signed", lambda s: s.update({BLOCKS: s[BLOCKS].view(torch.int8)}), BLOCKS, r"uint8, found torch\.int8"),
    ("float scales", lambda s: s.update({SCALES: s[SCALES].float()}), SCALES, r"uint8, found torch\.float32"),
    ("integer norm", lambda s: s.update({NORM: s[NORM].int()}), NORM, "wrong dtype"),
    ("double norm", lambda s: s.update({NORM: s[NORM].double()}), NORM, "wrong dtype"),
    ("unknown", lambda s: s.update({"model.extra": torch.ones(1)}), "model.extra", "unexpected"),
    ("a third layer", lambda s: s.update({BEYOND: torch.ones(4)}), BEYOND, "unexpected"),
    ("packed and not", lambda s: s.update({FLOAT: torch.ones(3, 64, 64)}), FLOAT, "unexpected"),
]


@pytest.mark.parametrize(("change", "tensor", "match"), [s[1:] for s in STATES], ids=[s[0] for s in STATES])
def test_wrong_tensors(tmp_path: Path, change: Change, tensor: str, match: str) -> None:
    state = gpt_oss_state()
    change(state)
    error = refused(make(tmp_path / "m", state=state), match)
    assert error.tensor == tensor
    assert str(tmp_path / "m") in error.path


SIZE_KEYS = [k for k, v in CONFIG.items() if type(v) is int and k != "num_experts_per_tok"]


@pytest.mark.parametrize("key", SIZE_KEYS)
def test_absurd_sizes(tmp_path: Path, key: str) -> None:
    make(tmp_path / "m")
    before = peak_rss_kib()
    for value in (0, -1, 10**12, 10**18, 2**63, True, "64", 64.0, [64], {}, "x" * 100_000):
        (tmp_path / "m" / "config.json").write_text(json.dumps(config(**{key: value})))
        error = refused(tmp_path / "m", key)
        assert error.path.endswith("config.json")
        assert len(str(error)) < 500
    for value in (1, 2**23, CONFIG[key] + 1, CONFIG[key] * 2):  # plausible lies: some tensor disagrees
        (tmp_path / "m" / "config.json").write_text(json.dumps(config(**{key: value})))
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "m")
    assert peak_rss_kib() - before < 8 << 10  # KiB


def test_missing_and_derived_sizes(tmp_path: Path) -> None:
    path = make(tmp_path / "m")
    for key in SIZE_KEYS:
        cfg = config()
        del cfg[key]
        (path / "config.json").write_text(json.dumps(cfg))
        if key == "head_dim":  # then hidden_size / num_attention_heads, which is 16, too
            open_checkpoint(path)
        elif key == "num_key_value_heads":  # then as many as heads: k_proj is too small
            assert refused(path, "shape disagrees").tensor == "model.layers.0.self_attn.k_proj.weight"
        else:
            refused(path, key)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": 80}, "hidden_size .expected a multiple of 32, found 80"),
        ({"num_key_value_heads": 3}, "num_key_value_heads .expected a divisor of 4"),
        ({"tie_word_embeddings": True}, "'lm_head.weight': unexpected"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings .expected true or false"),
        ({"swiglu_limit": -7.0}, "swiglu_limit .expected a positive number, found -7.0"),
        ({"swiglu_alpha": float("inf")}, "swiglu_alpha .expected a positive number, found inf"),
        ({"attention_bias": False}, "q_proj.bias': unexpected|k_proj.bias': unexpected"),
        (
            {"model_type": "mixtral"},
            "mxfp4 is read for one model_type only .expected gpt_oss, found 'mixtral'",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "unknown quant_method 'awq'; known: mxfp4, or none",
        ),
        ({"quantization_config": {"quant_method": 4}}, "expected a quant_method"),
        ({"quantization_config": {}}, "expected a quant_method"),
        ({"quantization_config": "mxfp4"}, "expected a quant_method"),
        ({"quantization_config": None}, "quantised, but config.json has no quantization_config"),
        ({"compression_config": {}}, "unknown quant_method 'compressed-tensors'"),
        ({"quantization_config": {"quant_method": "mxfp4", "act": "mxfp8"}}, "has 'act', which is not known"),
        (
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": "x"}},
            "expected strings",
        ),
        (
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [1]}},
            "expected strings",
        ),
        (
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["*"] * 257}},
            "too long",
        ),
        (
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["x"] * 4097}},
            "too long",
        ),
        (
            {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["x" * 257]}},
            "too long",
        ),
    ],
)
def test_wrong_configs(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    path = make(tmp_path / "m")
    (path / "config.json").write_text(json.dumps(config(**changes)))
    refused(path, match)


def test_tied_head_is_absent(tmp_path: Path) -> None:
    cfg = config(tie_word_embeddings=True)
    c = open_checkpoint(make(tmp_path / "m", cfg, gpt_oss_state(cfg)))
    assert not any(e.module == "lm_head" for e in c.groups)


def test_nan_scales(tmp_path: Path) -> None:
    state = gpt_oss_state()
    state[SCALES].view(-1)[[0, 5, -1]] = 255
    c = open_checkpoint(make(tmp_path / "m", state=state))
    counts = {e: gpt_oss.nan_scales(t) for e in c.groups if isinstance(t := c.load(e), QuantTensor)}
    assert {e.tensors[1]: n for e, n in counts.items() if n} == {SCALES: 3}


def test_activation() -> None:
    assert gpt_oss.activation(CONFIG) == GPT_OSS
    assert gpt_oss.activation({}) == Activation(
        "swiglu_oai", interleaved=True, alpha=1.702, beta=1.0, limit=7.0
    )
    assert gpt_oss.activation({"swiglu_alpha": 2, "swiglu_limit": 10}).limit == 10.0
    assert gpt_oss.activation({"swiglu_alpha": 2}).alpha == 2.0
    for bad in (0, -7.0, "7", True, None, float("nan"), float("inf"), [7.0]):
        with pytest.raises(CheckpointError, match=r"swiglu_limit .expected a positive number"):
            gpt_oss.activation({"swiglu_limit": bad})
