"""Writing: complete, in a form that others read, or without a trace."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import CONFIG, gpt_oss_state

from microscale.checkpoints import Source, write
from microscale.errors import CheckpointError


def test_write_refuses_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = gpt_oss_state()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, cfg, tensors, match in (
        ("full", CONFIG, state, "exists and is not an empty directory"),
        ("file", CONFIG, state, "cannot be written"),
        ("m", CONFIG, {}, "holds no tensors"),
        ("m", CONFIG, {"c": torch.ones(1, dtype=torch.complex64)}, "cannot hold torch.complex64"),
        ("m", CONFIG, {"s": torch.eye(2).to_sparse()}, "'s': a tensor in layout torch.sparse_coo"),
        ("m", CONFIG, {"s": torch.eye(2, device="meta")}, "'s': a tensor on the meta device"),
        ("m", CONFIG, {"\ud800": torch.ones(1)}, "not UTF-8"),
        ("m", {"\ud800": 1}, state, "m/config.json: JSON is not UTF-8"),
        ("m", CONFIG, {"__metadata__": torch.ones(1)}, "__metadata__"),
    ):
        with pytest.raises(CheckpointError, match=match):
            write(tmp_path / name, cfg, tensors)
    with pytest.raises(TypeError):
        write(tmp_path / "m", {"a": object()}, state)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"disk too full .expected \d+ bytes, found 1000 free"):
        write(tmp_path / "m", CONFIG, state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    assert (tmp_path / "full" / "x").read_text() == (tmp_path / "file").read_text() == "precious"


def test_a_link_to_a_directory_is_filled_and_stays(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        (tmp_path / f"to_{name}").symlink_to(name)
        write(tmp_path / f"to_{name}", CONFIG, {"a": torch.ones(1)})
        assert (tmp_path / f"to_{name}").is_symlink()
        assert Source.open(tmp_path / name).names() == ("a",)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop: cannot be written"):
        write(tmp_path / "loop", CONFIG, {"a": torch.ones(1)})


def test_what_is_written_is_what_torch_sees(tmp_path: Path) -> None:
    t = torch.randn(3, 4)
    write(tmp_path / "m", {}, {"negated": torch._neg_view(t), "turned": t.T, "spread": t[:1].expand(5, 4)})
    found = Source.open(tmp_path / "m")
    assert torch.equal(found.tensor("negated"), -t)
    assert torch.equal(found.tensor("turned"), t.T)
    assert torch.equal(found.tensor("spread"), t[:1].expand(5, 4))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE stands in for a full disk")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    state = gpt_oss_state()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, 5_000, 30_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match=os.strerror(errno.EFBIG)):
                write(tmp_path / "m", CONFIG, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m", CONFIG, gpt_oss_state())
    assert list(tmp_path.iterdir()) == []


def test_write_shards_names_permissions_and_alignment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = gpt_oss_state() | {"odd": torch.ones(3, dtype=torch.uint8), "scalar": torch.tensor(1.0).double()}
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()  # empty: taken over
    write("m", CONFIG, state, max_shard_bytes=1)
    files = sorted(p.name for p in Path("m").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(state):05}.safetensors"
    assert len(files) == len(state)
    write("deep/er/one", CONFIG, state)
    assert sorted(p.name for p in Path("deep/er/one").iterdir()) == ["config.json", "model.safetensors"]
    assert Path("deep/er").stat().st_mode == Path("deep/er/one").stat().st_mode
    source = Source.open("deep/er/one")
    assert all(i.offset % i.dtype.itemsize == 0 for i in source)
    assert min(i.offset for i in source) % 64 == 0
    transposed = torch.arange(6).view(2, 3).T
    write("t", {}, {"t": transposed})
    assert torch.equal(Source.open("t").tensor("t"), transposed)
