"""Directories: which files are the model, what an index may say, how strictly config.json is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny import entry, write_file

from microscale.checkpoints import Source, architecture, read_config
from microscale.errors import CheckpointError

A = entry()  # a valid entry: 4 bytes at 0


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        Source.open(path)


def test_what_is_no_model(tmp_path: Path) -> None:
    refused(tmp_path, "no .safetensors file")
    refused(tmp_path / "absent", "no such directory or file")
    refused(Path("nul\0byte"), "no such directory or file")
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"\x80\x04N.")
        refused(tmp_path / name, "pickles are never loaded.*convert to safetensors")
    refused(tmp_path, "only pickle files: pickles are never loaded")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "neither a .safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        write_file(tmp_path / name, {"a": A}, b"1234")
    refused(tmp_path, "2 .safetensors files and no model.safetensors.index.json")
    write_file(tmp_path / "model.safetensors", {"c": A}, b"1234")
    assert Source.open(tmp_path).names() == ("c",)  # the canonical name wins
    with pytest.raises(CheckpointError, match="no such tensor"):
        Source.open(tmp_path).tensor("a")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_devices_and_directories_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "not a regular file")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    refused(tmp_path, "not a regular file")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "not a regular file")


def indexed(directory: Path, weight_map: Any) -> Path:
    """Two good shards, a in one and b in the other, and the index given."""
    for i, name in ((1, "a"), (2, "b")):
        write_file(directory / f"s{i}.safetensors", {name: A}, b"1234")
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return directory


GOOD = {"a": "s1.safetensors", "b": "s2.safetensors"}
INDEXES: list[tuple[str, Any, str]] = [
    ("missing shard", {**GOOD, "c": "s3.safetensors"}, "s3.safetensors: cannot be read: No such file"),
    ("long shard name", {**GOOD, "c": "s" * 5000 + ".safetensors"}, "expected a file of this"),
    ("missing tensor", {**GOOD, "c": "s1.safetensors"}, "'c': the index says it is here"),
    ("unlisted tensor", {"a": "s1.safetensors", "c": "s2.safetensors"}, "'b': is not in the index"),
    ("wrong shard", {"a": "s2.safetensors", "b": "s1.safetensors"}, "in another shard than the index says"),
    ("parent", {**GOOD, "a": "../s1.safetensors"}, "expected a file of this directory"),
    ("absolute", {**GOOD, "a": "/etc/s1.safetensors"}, "expected a file of this directory"),
    ("inner", {**GOOD, "a": "x/../s1.safetensors"}, "expected a file of this directory"),
    ("backslash", {**GOOD, "a": "..\\s1.safetensors"}, "expected a file of this directory"),
    ("drive", {**GOOD, "a": "c:s1.safetensors"}, "expected a file of this directory"),
    (
        "line end",
        {**GOOD, "a": "s1\nerror.safetensors"},
        r"expected a file of this directory, found 's1\\nerror",
    ),
    ("NUL", {**GOOD, "a": "s1\0.safetensors"}, "expected a file of this directory"),
    ("pickle", {**GOOD, "a": "s1.bin"}, "expected a .safetensors file"),
    ("number", {**GOOD, "a": 1}, "expected a .safetensors file"),
    ("empty", {}, "weight_map"),
    ("list", [], "weight_map"),
    ("null", None, "weight_map"),
]


def test_good_index(tmp_path: Path) -> None:
    source = Source.open(indexed(tmp_path, GOOD))
    assert source.names() == ("a", "b")
    assert source.total_bytes == 8
    assert Source.open(tmp_path / "model.safetensors.index.json").names() == ("a", "b")


@pytest.mark.parametrize(("weight_map", "match"), [i[1:] for i in INDEXES], ids=[i[0] for i in INDEXES])
def test_lying_indexes(tmp_path: Path, weight_map: Any, match: str) -> None:
    refused(indexed(tmp_path, weight_map), match)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    indexed(blobs, GOOD)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert Source.open(snapshot).names() == ("a", "b")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[]", "not an object .expected object, found list"),
        ("", "invalid JSON"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"q": {"a": 1, "a": 2}}', "duplicate key 'a'"),
        ('{"a": ' + "[" * 65 + "]" * 65 + "}", "64 deep"),
        ('{"a": ' + "1" * 30 + "}", "integer of 30 digits"),
        (" " * 10_000_001, "too large"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_config_is_strict(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=match):
        read_config(tmp_path)


def test_config_reads(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_config(tmp_path)
    text = '{"a": [0.0, Infinity], "b": {"c": null, "d": "é\\u00e9"}}'  # Infinity: as Nemotron-H's configs have it
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert read_config(tmp_path) == {"a": [0.0, float("inf")], "b": {"c": None, "d": "éé"}}


def test_architecture() -> None:
    assert architecture({"model_type": "gpt_oss"}) == "gpt_oss"
    with pytest.raises(
        CheckpointError, match=r"unknown model_type 'my_model'.*transformers does not implement it$"
    ):
        architecture({"model_type": "my_model"})
    with pytest.raises(CheckpointError, match=r"code \(auto_map\) is never executed"):
        architecture({"model_type": "my_model", "auto_map": {"AutoConfig": "evil.Config"}}, "m/config.json")
    for bad in (None, 3, ["gpt_oss"]):
        with pytest.raises(CheckpointError, match="names no model_type"):
            architecture({"model_type": bad})
