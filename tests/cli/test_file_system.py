"""What may lie in the place of a checkpoint's files, and files that change while they are read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import microscale
from microscale.checkpoints import Source, write
from microscale.errors import CheckpointError
from microscale.integrations.hf import loading

Cli = Callable[..., Result]
BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pipes among its files")
def test_a_file_that_cannot_be_read_is_not_passed_over(
    cli: Cli, tiny: Path, tmp_path: Path, name: str
) -> None:
    """transformers goes on without it: with another end of text, or none, or without a chat."""
    path = shutil.copytree(tiny, tmp_path / "model") / name
    for make, why in (
        (lambda: path.symlink_to("nowhere"), f"{path}: cannot be read: No such file or directory"),
        (lambda: os.mkfifo(path), f"{path}: is not a regular file"),
    ):
        path.unlink(missing_ok=True)
        make()
        result = cli("run", path.parent, "abc", "--max-new-tokens", "2")
        assert (result.exit_code, result.stderr) == (2, f"microscale: error: {why}\n")


@pytest.mark.parametrize("after", ["cut short", "removed", "replaced"])
def test_a_checkpoint_that_changes_while_it_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """transformers opens the files again."""
    path = shutil.copytree(tiny, tmp_path / "model")
    file = path / "model.safetensors"

    def opened(directory: Path) -> Any:
        checkpoint = open_checkpoint(directory)
        if after == "cut short":
            os.truncate(file, 100)
        else:
            file.unlink()
            if after == "replaced":
                file.write_bytes(b"something else")
        return checkpoint

    open_checkpoint = loading.open_checkpoint
    monkeypatch.setattr(loading, "open_checkpoint", opened)
    with pytest.raises(CheckpointError, match="transformers cannot read it: "):
        microscale.load(path)


@pytest.mark.parametrize("command", ["run", "inspect", "explain", "eval"])
def test_a_file_is_no_model(cli: Cli, tiny: Path, command: str) -> None:
    file = tiny / "model.safetensors"
    result = cli(command, file, *(("1 2",) if command == "run" else ()))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"microscale: error: {file}: is no directory; a model is one, ")


def test_an_index_that_is_a_link_to_nowhere(tmp_path: Path) -> None:
    """Not a directory without an index, of whose files none says which belong together."""
    write(tmp_path / "model", {}, {"a": torch.ones(1), "b": torch.ones(1)}, max_shard_bytes=1)
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.unlink()
    index.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read: No such file"):
        Source.open(index.parent)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv lets go of root's right to read everything")
@pytest.mark.parametrize("command", ["inspect", "explain", "run"])
def test_a_directory_that_nobody_may_look_into(tiny: Path, tmp_path: Path, command: str) -> None:
    path = shutil.copytree(tiny, tmp_path / "model")
    path.chmod(0)
    plain = ("setpriv", "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search")
    words = [
        *(plain if os.geteuid() == 0 else ()),
        sys.executable,
        "-m",
        "microscale.cli",
        command,
        str(path),
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    finally:
        path.chmod(0o755)
    why = f"microscale: error: {path}/config.json: cannot be read: Permission denied\n"
    assert (done.returncode, done.stderr) == (2, why)
