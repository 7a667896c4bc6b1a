"""Names that stand for models, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from microscale.checkpoints import open_checkpoint, read_config
from microscale.errors import CheckpointError
from microscale.models import BUNDLED, CONFIGS, config_alone, resolve


def test_the_bundled_model_is_a_sound_checkpoint_within_its_size() -> None:
    path = resolve(BUNDLED)
    checkpoint = open_checkpoint(path)
    assert checkpoint.dialect == "gpt_oss"
    assert {
        e.format for e in checkpoint.groups if e.module.endswith(".experts") and e.role in ("w13", "w2")
    } == {"mxfp4"}
    assert sum(f.stat().st_size for f in path.iterdir()) <= 8_000_000
    assert (path / "heldout.txt").exists()
    assert "Licence" in (path / "README.md").read_text()


@pytest.mark.parametrize("name, layers, experts", [("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)])
def test_public_configs(name: str, layers: int, experts: int) -> None:
    config = read_config(resolve(name))
    assert (config["num_hidden_layers"], config["num_local_experts"]) == (layers, experts)
    assert len(config["layer_types"]) == layers
    assert config_alone(resolve(name))
    assert name in CONFIGS


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_id_is_fetched_without_pickles_and_without_weights_where_none_are_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: bool
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(model_id: str, **options: Any) -> str:
        asked.update(options, id=model_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("someone/model", weights) == tmp_path
    assert asked["id"] == "someone/model"
    assert ("*.safetensors" in asked["allow_patterns"]) == weights
    assert not any(p.endswith((".bin", ".pt", ".py", "*")) for p in asked["allow_patterns"])


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(model_id: str, **options: Any) -> str:
        raise OSError("We couldn't connect\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"someone/model: not a local directory.*We couldn't connect$"):
        resolve("someone/model")
