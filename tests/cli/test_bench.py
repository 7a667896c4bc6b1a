"""`microscale bench kernels` on tiny shapes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from made import document
from typer.testing import Result

from microscale import machine
from microscale.machine import detect

if not detect().core:
    pytest.skip(f"the C++ core is not in this installation: {detect().core_missing}", allow_module_level=True)

from microscale.bench import ceilings

Cli = Callable[..., Result]
TINY = (
    "bench",
    "kernels",
    "--shape",
    "64x96,4x2x64x32",
    "--format",
    "mxfp4",
    "--repeat",
    "2",
    "--threads",
    "1",
)
PEERS = Path(__file__).parents[2] / "bench" / "peers"


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_LEAST", 8 << 20)
    monkeypatch.setattr(ceilings, "_WINDOW", 2 << 20)
    monkeypatch.setattr(machine, "cache_bytes", lambda: 1 << 20)
    monkeypatch.delenv("MICROSCALE_CPU_LEVEL", raising=False)


def test_json(cli: Cli) -> None:
    found = document(cli(*TINY, "--m", "1,5", "--json"))
    assert {(c["op"], c["shape"], c["m"]) for c in found["cases"]} == {
        (op, shape, m) for op, shape in (("linear", "64x96"), ("moe", "4x2x64x32")) for m in (1, 5)
    }
    assert (found["threads"], found["repeat"]) == (1, 2)
    for key in ("microscale", "torch", "python", "platform", "machine"):
        assert found[key]
    level = found["cases"][0]["level"]
    assert list(found["ceilings"]) == [level]
    c = found["ceilings"][level]
    assert c["probes"] == 2 * len(found["cases"])
    assert 0 < c["read_rate_min"] <= c["read_rate"] <= c["read_rate_max"]
    assert 0 < c["flop_rate_min"] <= c["flop_rate"] <= c["flop_rate_max"]
    for case in found["cases"]:
        assert len(case["seconds"]) == 2
        assert 0 < case["seconds_min"] <= case["seconds_median"] <= case["seconds_max"]
        assert case["bound"] in ("memory", "compute")
        assert case["flop_rate"] == pytest.approx(case["flops"] / case["seconds_median"])
        assert case["of_floor"] > 0
    linear = next(c for c in found["cases"] if c["op"] == "linear")
    assert linear["weight_bytes_median"] == 64 * 96 // 2 + 64 * 3


def test_linears_that_are_not_packed(cli: Cli) -> None:
    words = [*TINY]
    words[words.index("mxfp4")] = "bf16,mxfp4,fp16"
    cases = document(cli(*words, "--m", "1,9", "--json"))["cases"]
    assert [(c["op"], c["format"], c["m"]) for c in cases] == [
        *(("linear", fmt, m) for fmt in ("bf16", "mxfp4", "fp16") for m in (1, 9)),
        *(("moe", "mxfp4", m) for m in (1, 9)),
    ]
    assert {c["weight_bytes_median"] for c in cases if c["format"] in ("bf16", "fp16")} == {2 * 64 * 96}
    words[words.index("bf16,mxfp4,fp16")] = "bf16"
    refused = cli(*words, "--op", "moe")
    assert refused.exit_code == 2
    assert "--format bf16: experts are packed, and no shape given is a linear" in refused.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_a_device_or_pipe_is_written_to_and_stays_what_it_is(cli: Cli, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ends = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)  # of a pipe that holds 64 KiB
    try:
        assert cli(*TINY, "--m", "3", "--save", pipe).exit_code == 0
        assert pipe.is_fifo()
        assert len(json.loads(os.read(ends, 1 << 16))["cases"]) == 2
    finally:
        os.close(ends)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_link_is_followed(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to("there/bench.json")
    for _ in range(2):
        assert cli(*TINY, "--m", "3", "--save", tmp_path / "link.json").exit_code == 0
        assert (tmp_path / "link.json").is_symlink()
        assert os.listdir(tmp_path / "there") == ["bench.json"]
    (tmp_path / "link.json").unlink()
    (tmp_path / "link.json").symlink_to("nowhere/bench.json")
    refused = cli(*TINY, "--m", "3", "--save", tmp_path / "link.json")
    assert "there is no directory" in refused.stderr


def test_table_and_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = cli(*TINY, "--m", "3", "--save", path)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if " mxfp4 " in line]
    assert [(row[1], row[3], len(row)) for row in rows] == [("64x96", "3", 11), ("4x2x64x32", "3", 11)]
    assert "of floor" in result.stdout
    assert "GB/s" in result.stdout
    assert len(json.loads(path.read_text())["cases"]) == 2


def test_op_quick_and_levels(cli: Cli) -> None:
    found = document(
        cli(
            "bench",
            "kernels",
            "--quick",
            "--shape",
            "64x96,4x2x64x32",
            "--op",
            "moe",
            "--level",
            "all",
            "--json",
        )
    )
    assert {c["format"] for c in found["cases"]} == {"mxfp4"}
    assert {c["op"] for c in found["cases"]} == {"moe"}
    assert [c["m"] for c in found["cases"] if c["level"] == "plain"] == [1, 32, 512]
    assert found["repeat"] == 5
    assert set(found["ceilings"]) == {c["level"] for c in found["cases"]}
    assert "plain" in found["ceilings"]


def test_the_process_is_left_as_it_was(cli: Cli) -> None:
    threads = torch.get_num_threads()
    document(cli(*TINY[:-1], str(threads + 1), "--m", "1", "--level", "plain", "--json"))
    assert torch.get_num_threads() == threads
    assert "MICROSCALE_CPU_LEVEL" not in os.environ


@pytest.mark.parametrize(
    "args, sentence",
    [
        (("--shape", "nothing"), "unknown shape 'nothing'; known: gpt-oss-20b"),
        (("--format", "mxfp5"), "unknown format 'mxfp5'; did you mean mxfp4?"),
        (("--format", "all,mxfp4"), "unknown format 'all'; "),
        (("--op", "attention"), "unknown op 'attention'"),
        (("--shape", "64x96", "--op", "moe"), "--op moe: no shape given is of that kind"),
        (("--m", "0"), "--m '0': numbers from 1 to"),
        (("--m", "1,x"), "--m '1,x': numbers from 1 to"),
        (("--level", "sse"), "unknown level 'sse'"),
        (("--save", "/nowhere/a.json"), "/nowhere/a.json: there is no directory /nowhere"),
    ],
)
def test_errors(cli: Cli, args: tuple[str, ...], sentence: str) -> None:
    result = cli("bench", "kernels", *args)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_a_level_that_is_not_here(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROSCALE_CPU_LEVEL", "plain")
    result = cli(*TINY, "--level", "avx2")
    assert result.exit_code == 2
    assert "--level avx2: the widest level here is plain" in result.stderr


def test_a_plot_needs_matplotlib_and_says_so_before_anything_is_timed(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, *args: Any) -> Any:
        return None if name == "matplotlib" else real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(ceilings, "Probe", None)
    result = cli(*TINY, "--plot", tmp_path / "a.png")
    assert result.exit_code == 2
    assert (
        "a plot is drawn by matplotlib, which is not installed: pip install 'microscale[bench]'"
        in result.stderr
    )


def test_plot(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.png"
    assert cli(*TINY, "--m", "1,4", "--plot", path).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["roofline.png"]
    both = cli(*TINY, "--m", "1", "--plot", path, "--save", tmp_path / "." / path.name)
    assert (both.exit_code, both.stderr) == (
        2,
        f"microscale: error: {path}: --plot and --save are one file\n",
    )


def test_help(cli: Cli) -> None:
    result = cli("bench", "kernels", "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "kernels" in cli("bench", "--help").stdout


def test_tune_asks_for_known_groups_and_a_hopper_gpu(cli: Cli) -> None:
    result = cli("bench", "tune", "--group", "5 bits")
    assert result.exit_code == 2
    assert "unknown group of formats '5 bits'" in result.stderr
    result = cli("bench", "tune", "--op", "attention")
    assert result.exit_code == 2
    assert "unknown kind of layer 'attention'" in result.stderr
    if not torch.cuda.is_available():
        result = cli("bench", "tune")
        assert result.exit_code == 2
        why = "needs a Hopper GPU" if find_spec("triton") else "needs the package triton"
        assert f"bench tune {why}" in result.stderr


@pytest.mark.skipif(detect().level == "amx", reason="this CPU has AMX, so the peer is not refused")
def test_vllm_without_amx_is_a_sentence() -> None:
    done = subprocess.run([sys.executable, PEERS / "vllm_cpu.py"], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"vLLM's fused_experts_cpu needs AMX for MXFP4, and this CPU has {detect().level}: nothing is compared\n"
    )


def test_llama_cpps_table_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(PEERS))
    import llama_cpp

    tool = tmp_path / "tool"
    line = (
        "  MUL_MAT_ID(type_a=mxfp4,type_b=f32,n_mats=32,n_used=4,b=0,m=2880,n=4,k=2880,amax=1.000000,m_v=0):    "
        "   124 runs -  9453.38 us/run - 265.42 MFLOP/run - \\033[1;34m 28.08 GFLOPS\\033[0m\\n"
    )
    tool.write_text(f"#!/bin/sh\nprintf '{line}'\n")
    tool.chmod(0o755)
    product = llama_cpp.Product("MUL_MAT_ID", 2880, 4, 2880, 32, 4)
    assert llama_cpp.peer_seconds(tool, product) == pytest.approx(9.45338e-3)
    assert product.flops == 265420800
    tool.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(SystemExit, match="0 cases"):
        llama_cpp.peer_seconds(tool, product)
