"""`microscale inspect`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS, document
from typer.testing import Result

from microscale import quantize
from microscale.checkpoints import Entry
from microscale.cli.inspect import Group, count, missing, nan_scales, partly

Cli = Callable[..., Result]


def test_every_byte_is_accounted_for(cli: Cli, bare: Path) -> None:
    result = cli("inspect", bare, "--json")
    assert result.exit_code == 0
    found = document(result)
    on_disk = sum(f.stat().st_size for f in bare.glob("*.safetensors"))
    assert found["bytes"] == on_disk
    headers = sum(f["header_bytes"] for f in found["files"])
    assert sum(g["bytes"] for g in found["groups"]) + headers == on_disk


def test_what_is_quantised_and_what_is_not(cli: Cli, bare: Path) -> None:
    found = document(cli("inspect", bare, "--json"))
    groups = {g["name"]: g for g in found["groups"]}
    experts = LAYERS * EXPERTS * 3 * INTERMEDIATE * HIDDEN
    assert groups["experts"] == {
        "name": "experts",
        "format": "mxfp4",
        "quantised": True,
        "tensors": 4 * LAYERS,
        "parameters": experts,
        "bytes": experts * 17 // 32,
    }
    assert found["quantised_parameters"] == experts
    assert [name for name, g in groups.items() if not g["quantised"]] == [
        "embedding",
        "attention q/k/v/o",
        "router",
        "expert biases",
        "lm_head",
        "norms, biases, sinks",
    ]
    assert (found["dialect"], found["architecture"], found["formats"]) == ("gpt_oss", "gpt_oss", ["mxfp4"])
    assert found["nan_scales"] is None


def test_the_text(cli: Cli, bare: Path) -> None:
    lines = cli("inspect", bare).stdout.splitlines()
    assert lines[0].startswith(f"{bare}: gpt_oss, gpt_oss dialect, ")
    row = next(line for line in lines if line.startswith("experts "))
    assert row.split()[:5] == ["experts", "mxfp4", "8", "49.2", "k"]
    assert row.split()[-2:][1] == "%"
    size = (bare / "model.safetensors").stat().st_size
    assert f"total is {size} bytes, the size of model.safetensors" in lines
    assert any(line.endswith("in mxfp4, all experts among them") for line in lines)


def test_require(cli: Cli, bare: Path) -> None:
    assert cli("inspect", bare, "--require", "mxfp4").exit_code == 0
    assert cli("inspect", bare, "--require", "mxfp4", "--require", "nvfp4").exit_code == 1
    wrong = cli("inspect", bare, "--require", "nvfp4")
    assert wrong.exit_code == 1
    assert "FAIL: no weight is in nvfp4, which is required" in wrong.stdout
    assert "FAIL: weights are in mxfp4, which is not required" in wrong.stdout
    unknown = cli("inspect", bare, "--require", "mxfp5")
    assert unknown.exit_code == 2
    assert "did you mean mxfp4?" in unknown.stderr


def test_a_nan_scale_is_found_on_request(cli: Cli, bare: Path, nan: Path) -> None:
    assert cli("inspect", nan).exit_code == 0
    clean = cli("inspect", bare, "--scan")
    assert clean.exit_code == 0
    assert "no scale is NaN" in clean.stdout
    result = cli("inspect", nan, "--scan", "--json")
    assert result.exit_code == 1
    found = document(result)
    assert found["nan_scales"] == {"model.layers.1.mlp.experts w2": 1}
    assert found["problems"] == ["model.layers.1.mlp.experts w2: 1 of its scales are NaN"]


def test_what_cannot_be_read_is_exit_code_2(cli: Cli, bare: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((bare / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((bare / "model.safetensors").read_bytes()[:-1])
    result = cli("inspect", broken, "--json")
    assert result.exit_code == 2
    assert document(result)["error"]["type"] == "CheckpointError"
    assert "model.safetensors" in result.stderr


def test_a_config_alone_says_what_to_do_instead(cli: Cli) -> None:
    result = cli("inspect", "gpt-oss-20b")
    assert result.exit_code == 2
    assert "`microscale explain gpt-oss-20b` plans it" in result.stderr


def experts(role: str, fmt: str | None, layer: int = 0) -> Entry:
    return Entry(f"model.layers.{layer}.mlp.experts", role, fmt, ("x",), (4, 64, 32))


def test_partly_quantised_experts_are_a_failure() -> None:
    whole = [experts("w13", "mxfp4"), experts("w2", "mxfp4"), experts("w2_bias", None)]
    assert partly(whole) == []
    assert partly([experts("w13", None), experts("w2", None)]) == []
    (sentence,) = partly([*whole, experts("w13", "mxfp4", 1), experts("w2", None, 1)])
    assert sentence == "1 of 4 expert weights are not quantised, such as model.layers.1.mlp.experts w2"


def test_experts_that_a_producer_did_not_fuse_count_too() -> None:
    def entry(leaf: str, fmt: str | None) -> Entry:
        return Entry(f"model.layers.0.mlp.experts.3.{leaf}", "weight", fmt, ("x",), (64, 32))

    (sentence,) = partly([entry("gate_proj", "nvfp4"), entry("up_proj", "nvfp4"), entry("down_proj", None)])
    assert sentence.startswith("1 of 3 expert weights")
    shared = Entry("model.layers.0.mlp.shared_experts.up_proj", "weight", None, ("x",), (64, 32))
    assert partly([entry("gate_proj", "nvfp4"), shared]) == []


def test_missing() -> None:
    groups = [Group("experts", "mxfp4", True), Group("attention", "bf16", False)]
    assert missing(groups, []) == []
    assert missing(groups, ["mxfp4"]) == []
    assert missing(groups[1:], ["mxfp4"]) == ["no weight is in mxfp4, which is required"]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e5m2", "nvfp4", "fp8_block128"])
def test_nan_scales_of_every_scale_encoding(name: str) -> None:
    x = torch.randn(128, 256)
    assert nan_scales(quantize(x, name)) == 0
    x[0, 0] = float("nan")
    x[3, 200] = float("inf")
    assert nan_scales(quantize(x, name)) == 2


def test_a_nan_tensor_scale_counts() -> None:
    q = quantize(torch.randn(2, 4, 32), "nvfp4")
    assert q.tensor_scale is not None
    q.tensor_scale[1] = float("nan")
    assert nan_scales(q) == 1


@pytest.mark.parametrize(
    "n, text", [(7, "7"), (999, "999"), (1500, "1.5 k"), (20_914_757_184, "20.9 G"), (10**13, "10 T")]
)
def test_counts(n: int, text: str) -> None:
    assert count(n) == text
