"""`Source`: agreement with safetensors on what is right; a typed error for every way of being wrong."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import entry, file_bytes, gpt_oss_state, peak_rss_kib, raw_bytes, write_file

from microscale.checkpoints import Source, write
from microscale.checkpoints.header import DTYPES
from microscale.checkpoints.strict import MAX_DEPTH
from microscale.errors import CheckpointError

A = entry()  # a valid entry: 4 bytes at 0


def refused(path: Path, match: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as info:
        Source.open(path)
    return info.value


def test_agrees_with_safetensors_on_every_dtype(tmp_path: Path) -> None:
    state = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        if name != "F4":  # safetensors' torch writer has no F4; see below
            raw = torch.randint(
                0, 2 if dtype == torch.bool else 256, (3, i + 1, dtype.itemsize), dtype=torch.uint8
            )
            state[name.lower()] = raw.view(dtype).reshape(3, i + 1)
    state["empty"] = torch.zeros(0, 7)
    state["scalar"] = torch.tensor(3.5)
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    source = Source.open(path)
    with safe_open(path, "pt") as theirs:
        assert set(source.names()) == set(theirs.keys()) == set(state)
        for name in state:
            want, got, info = theirs.get_tensor(name), source.tensor(name), source.info(name)
            assert got.dtype == want.dtype == info.dtype == state[name].dtype
            assert got.shape == want.shape == info.shape
            assert raw_bytes(got) == raw_bytes(want) == raw_bytes(state[name])
            assert info.nbytes == want.numel() * want.element_size()
    assert source.total_bytes == sum(t.numel() * t.element_size() for t in state.values())


def test_f4_counts_numbers_in_the_file_and_bytes_in_torch(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.safetensors", {"w": entry("F4", (2, 6), (0, 6))}, bytes(range(6)))
    t = Source.open(path).tensor("w")
    assert (t.dtype, t.shape) == (torch.float4_e2m1fn_x2, (2, 3))
    assert raw_bytes(t) == bytes(range(6))
    with safe_open(path, "pt") as theirs:
        assert theirs.get_tensor("w").shape == t.shape


def test_shards_and_order(tmp_path: Path) -> None:
    state = gpt_oss_state()
    write(tmp_path / "m", {"a": 1}, state, max_shard_bytes=20_000)
    source = Source.open(tmp_path / "m")
    assert len(source.files) > 2
    assert set(source.names()) == set(state)
    for name, t in state.items():
        assert torch.equal(source.tensor(name), t)
        assert source.info(name).file.parent == tmp_path / "m"
    assert {i.name for i in source} == set(state)
    for file in source.files:
        with safe_open(file, "pt") as theirs:
            assert set(theirs.keys()) == {i.name for i in source if i.file == file}


def test_tensors_are_views_of_a_read_only_map_and_outlive_the_source(tmp_path: Path) -> None:
    size = 64 << 20
    path = write_file(tmp_path / "x.safetensors", {"w": entry("BF16", (size // 2,), (0, size))})
    os.truncate(path, path.stat().st_size + size)  # sparse: only touched pages cost anything
    before = peak_rss_kib()
    source = Source.open(path)
    first, second = source.tensor("w"), source.tensor("w")
    assert first.data_ptr() == second.data_ptr()
    assert peak_rss_kib() - before < 16 << 10  # KiB
    if sys.platform == "linux":
        maps = [
            line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
        ]
        assert maps
        assert all(mode.startswith("r--") for mode in maps)
    del source, second
    gc.collect()
    assert first[-1] == 0


def test_a_file_cut_short_after_it_was_opened_is_not_read(tmp_path: Path) -> None:
    """A read of pages that a file no longer has would end the process."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(5000), "b": torch.ones(5000)}, path)
    source = Source.open(path)
    first, second = source
    os.truncate(path, second.offset)
    assert torch.equal(source.tensor(first.name), torch.zeros(5000))
    wanted = rf"{second.name}': its file was cut short .* .expected {path.stat().st_size + 20000} bytes"
    with pytest.raises(CheckpointError, match=wanted):
        source.tensor(second.name)


def test_equal_storages_mean_tied_to_transformers_so_each_has_its_own(tmp_path: Path) -> None:
    save_file({"a": torch.ones(8), "b": torch.zeros(8)}, tmp_path / "x.safetensors")
    source = Source.open(tmp_path)
    a, b = source.tensor("a"), source.tensor("b")
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
    assert a.untyped_storage().nbytes() == 32


def test_misaligned_tensor_is_copied(tmp_path: Path) -> None:
    raw = json.dumps({"w": entry("F32", (2,), (0, 8))}).encode()
    raw += b" " * (1 - (8 + len(raw)) % 2)  # data at an odd offset
    want = torch.tensor([1.5, -2.0])
    path = write_file(tmp_path / "x.safetensors", raw, raw_bytes(want))
    source = Source.open(path)
    assert source.info("w").offset % 2
    got = source.tensor("w")
    assert torch.equal(got, want)
    assert got.data_ptr() % 4 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="counts /proc/self/fd")
def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    write(tmp_path / "m", {}, gpt_oss_state(), max_shard_bytes=20_000)
    before = len(os.listdir("/proc/self/fd"))
    source = Source.open(tmp_path / "m")
    assert len(os.listdir("/proc/self/fd")) == before + len(source.files)
    last = source.files[-1]
    del source
    assert len(os.listdir("/proc/self/fd")) == before
    last.write_bytes(last.read_bytes()[:-1])
    refused(tmp_path / "m", "truncated")
    assert len(os.listdir("/proc/self/fd")) == before


HEADERS: list[tuple[str, Any, bytes, str]] = [
    ("array", b"[1]", b"", "does not start with"),
    ("space first", b' {"a":1}', b"", "does not start with"),
    ("not JSON", b"{nope}", b"", "invalid JSON"),
    ("two objects", b"{}{}", b"", "invalid JSON"),
    ("not UTF-8", b'{"\xff":1}', b"", "not UTF-8"),
    ("UTF-16", '{"a":1}'.encode("utf-16-le"), b"", "invalid JSON"),
    ("lone surrogate", b'{"\\ud800":' + json.dumps(A).encode() + b"}", b"1234", "not UTF-8: surrogates"),
    ("NaN", b'{"a":NaN}', b"", "NaN is not a JSON number"),
    ("infinite", b'{"a":1e999}', b"", "not a JSON number"),
    ("huge integer", b'{"a":' + b"9" * 5000 + b"}", b"", "integer of 5000 digits"),
    ("deep", b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", b"", f"more than {MAX_DEPTH} deep"),
    ("deeper than Python", b'{"a":' + b"[" * 100_000, b"", f"more than {MAX_DEPTH} deep"),
    ("deep after an escape", b'{"\\"a[":' + b'{"a":' * 100_000, b"", f"more than {MAX_DEPTH} deep"),
    ("many values", b'{"a":[' + b"0," * 1_000_001 + b"0]}", b"", "more than 1000000 values"),
    ("duplicate", b'{"a":%b,"a":%b}' % ((json.dumps(A).encode(),) * 2), b"1234", "duplicate key 'a'"),
    ("duplicate inside", b'{"a":{"dtype":"U8","dtype":"U8"}}', b"", "duplicate key 'dtype'"),
    ("empty", {}, b"", "holds no tensors"),
    ("only metadata", {"__metadata__": {"a": "b"}}, b"", "holds no tensors"),
    ("metadata list", {"__metadata__": [], "a": A}, b"1234", "__metadata__"),
    ("metadata number", {"__metadata__": {"a": 1}, "a": A}, b"1234", "__metadata__"),
    ("nameless", {"": A}, b"1234", "name has 0 characters"),
    ("long name", {"n" * 2000: A}, b"1234", "name has 2000 characters"),
    ("entry", {"a": 3}, b"", "header entry"),
    ("extra field", {"a": {**A, "x": 1}}, b"1234", "header entry"),
    ("no shape", {"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234", "header entry"),
    ("dtype", {"a": entry("F6")}, b"1234", "unknown dtype.*F64, F32.*found 'F6'"),
    ("dtype list", {"a": entry(["U8"])}, b"1234", "unknown dtype"),
    ("negative", {"a": entry(shape=(-4,))}, b"1234", "shape .expected at most 64 non-neg"),
    ("two negatives", {"a": entry(shape=(-2, -2))}, b"1234", "shape .expected at most 64 non-neg"),
    ("bool", {"a": entry(shape=(True, 4))}, b"1234", "shape .expected at most 64 non-neg"),
    ("float", {"a": entry(shape=(4.0,))}, b"1234", "shape .expected at most 64 non-neg"),
    ("shape object", {"a": entry(shape={"0": 4})}, b"1234", "shape .expected at most 64 non-neg"),
    ("rank", {"a": entry(shape=(1,) * 65)}, b"1234", "shape .expected at most 64 non-neg"),
    ("overflow", {"a": entry(shape=(2**32, 2**32))}, b"1234", "shape overflows"),
    ("wraps to 4", {"a": entry(shape=(2**62 + 1, 4))}, b"1234", "shape overflows"),
    ("stride overflow", {"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b"", "shape overflows"),
    ("odd F4", {"a": entry("F4", (2, 5), (0, 5))}, b"12345", "even last dimension"),
    ("offsets", {"a": entry(offsets=(0,))}, b"1234", "data_offsets .expected two"),
    ("offset bool", {"a": entry(offsets=(False, 4))}, b"1234", "data_offsets .expected two"),
    ("offset negative", {"a": entry(offsets=(-4, 0))}, b"1234", "data_offsets .expected two"),
    ("offset float", {"a": entry(offsets=(0, 4.0))}, b"1234", "data_offsets .expected two"),
    (
        "backwards",
        {"a": entry(offsets=(4, 0))},
        b"1234",
        "disagree with dtype and shape .expected 4 bytes, found -4",
    ),
    (
        "too few bytes",
        {"a": entry("BF16")},
        b"1234",
        "disagree with dtype and shape .expected 8 bytes, found 4",
    ),
    ("too many bytes", {"a": entry(shape=(3,))}, b"1234", "disagree with dtype and shape .expected 3 bytes"),
    ("past the end", {"a": A, "b": entry(offsets=(4, 8))}, b"123456", "'b': ends past the end"),
    ("far past the end", {"a": entry(shape=(2**62,), offsets=(0, 2**62))}, b"1234", "ends past the end"),
    ("overlap", {"a": A, "b": entry(offsets=(2, 6))}, b"123456", "'b': overlaps another"),
    ("same bytes twice", {"a": A, "b": A}, b"1234", "overlaps another"),
    ("hole", {"a": A, "b": entry(offsets=(6, 10))}, b"1234567890", "'b': bytes before it belong to no"),
    ("hole first", {"a": entry(offsets=(1, 5))}, b"12345", "'a': bytes before it belong to no"),
    ("trailing", {"a": A}, b"12345", "bytes at the end belong to no"),
]


@pytest.mark.parametrize(("header", "data", "match"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_lying_headers(tmp_path: Path, header: Any, data: bytes, match: str) -> None:
    path = write_file(tmp_path / "x.safetensors", header, data)
    start = time.thread_time()
    tracemalloc.start()
    try:
        error = refused(path, match)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert time.thread_time() - start < 1
    assert str(path) in str(error)
    assert len(str(error)) < 1000


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "file of 0 bytes"),
        (b"\2\0\0\0\0\0\0\0", "file of 8 bytes"),
        (file_bytes({"a": A}, b"1234", length=2**63 + 1), "header too long"),
        (file_bytes({"a": A}, b"1234", length=100_000_001), "header too long"),
        (file_bytes({"a": A}, b"1234", length=100_000_000), "truncated inside the header"),
        (file_bytes({"a": A}, b"1234", length=0), "invalid JSON|does not start"),
        (file_bytes({"a": A}, b"1234")[:-1], "truncated"),
        (b"\x80\x04\x95" + b"pickled" * 9, "header too long"),
    ],
)
def test_broken_files(tmp_path: Path, raw: bytes, match: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw)
    refused(tmp_path, match)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    raw = file_bytes({"a": A, "b": entry("BF16", (3,), (4, 10))}, b"1234567890")
    path = tmp_path / "x.safetensors"
    for n in range(len(raw)):
        path.write_bytes(raw[:n])
        refused(path, "truncated|no safetensors file")


def test_opening_warns_of_nothing_and_imports_no_pickle_reader(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from microscale.checkpoints import Source\n"
        f"print(Source.open({str(tmp_path)!r}).tensor('a').tolist(), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[1.0, 1.0, 1.0] False"
    assert "Warning" not in done.stderr
