"""Unquantised checkpoints: real ones by transformers, and what must not pass for one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import config
from torch import Tensor

from microscale.checkpoints import open_checkpoint, plain, write
from microscale.errors import CheckpointError


def test_gpt_oss_saved_by_transformers(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    cfg = {
        k: v for k, v in config().items() if k not in ("quantization_config", "architectures", "model_type")
    }
    model = GptOssForCausalLM(GptOssConfig(**cfg)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    c = open_checkpoint(tmp_path / "m")
    state = model.state_dict()
    assert c.dialect == "plain"
    assert len(c.source.files) > 1
    assert {f"{e.module}.{e.role}" for e in c.groups} == set(state)
    for e in c.groups:
        t = c.load(e)
        assert isinstance(t, Tensor)
        assert (e.format, e.shape) == (None, tuple(t.shape))
        assert torch.equal(t, state[e.tensors[0]])


def test_ours_is_read_by_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    model = LlamaForCausalLM(cfg).half()
    write(tmp_path / "m", json.loads(cfg.to_json_string()), model.state_dict(), max_shard_bytes=4000)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float16)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in again.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_entries(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {
        "a.b.weight": torch.ones(2, 3, dtype=dtype),
        "a.position_ids": torch.arange(3),
        "mask": torch.ones(2, dtype=torch.bool),
    }
    write(tmp_path / "m", {"model_type": "x"}, state)
    c = open_checkpoint(tmp_path / "m")
    assert {(e.module, e.role, e.format, e.shape) for e in c.groups} == {
        ("a.b", "weight", None, (2, 3)),
        ("a", "position_ids", None, (3,)),
        ("", "mask", None, (2,)),
    }


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("w.weight", torch.float8_e4m3fn),
        ("w.weight", torch.float8_e5m2),
        ("w.scale", torch.float8_e8m0fnu),
        ("w.weight", torch.float4_e2m1fn_x2),
        ("w.weight", torch.int8),
        ("w.weight_packed", torch.uint8),
        ("w.qweight", torch.int32),
        ("experts.gate_up_proj_blocks", torch.uint8),
    ],
)
def test_quantised_without_a_word_is_refused(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    write(tmp_path / "m", {}, {name: torch.zeros(16, dtype=torch.uint8).view(dtype)})
    with pytest.raises(CheckpointError, match="scales are unknown") as info:
        open_checkpoint(tmp_path / "m")
    assert (info.value.tensor, info.value.found) == (name, dtype)


def test_wide_numbers_are_not_called_quantised(tmp_path: Path) -> None:
    write(tmp_path / "m", {}, {"w.weight": torch.ones(2, dtype=torch.float64)})
    with pytest.raises(
        CheckpointError, match=r"wrong dtype \(expected torch.bfloat16 or.*found torch.float64"
    ):
        open_checkpoint(tmp_path / "m")


def test_there_is_nothing_packed_to_load(tmp_path: Path) -> None:
    write(tmp_path / "m", {}, {"w": torch.ones(1)})
    c = open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match="is not quantised"):
        plain.load(c.source, c.groups[0])


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint("openai/gpt-oss-20b-not-downloaded")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        open_checkpoint(tmp_path)
