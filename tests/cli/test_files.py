"""Files that commands write: whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import sys
from pathlib import Path

import pytest

from microscale.cli.files import check_writable, write_file
from microscale.errors import MicroscaleError


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    check_writable(path)
    write_file(path, b"content")
    assert path.read_bytes() == b"content"
    assert os.listdir(tmp_path) == [path.name]


def test_what_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(b"precious")
    for name, why in (
        ("", "is a directory"),
        ("loop", f"nothing can be written there: {os.strerror(errno.ELOOP)}"),
        ("x" * 256, f"nothing can be written there: {os.strerror(errno.ENAMETOOLONG)}"),
        ("no/file", "there is no directory"),
        ("file/file", "there is no directory"),
    ):
        with pytest.raises(MicroscaleError, match=why):
            check_writable(tmp_path / name)
    check_writable(None)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE stands in for a full disk")
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"precious")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(MicroscaleError, match=os.strerror(errno.EFBIG)):
            write_file(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == [path.name]
