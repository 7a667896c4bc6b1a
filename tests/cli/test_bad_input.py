"""What a user may get wrong, or a file may say: one line on stderr, exit code 2, and nothing half done."""

from __future__ import annotations

import json
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

from microscale.bench import layers
from microscale.bench.shapes import parse_shape
from microscale.cli import doctor as doctor_module
from microscale.cli import main
from microscale.formats import FORMATS

Cli = Callable[..., Result]
SEED_BEYOND = str(2**63)


def error_of(result: Result) -> str:
    """The one line; nothing else was said."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("microscale: error: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def changed(tiny: Path, to: Path, **config: Any) -> Path:
    """A copy of a checkpoint whose config.json says something else."""
    shutil.copytree(tiny, to)
    told = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(told))
    return to


@pytest.mark.parametrize(
    "config, said",
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok (expected an integer from 1 to 4, found 5)"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok (expected an integer from 1 to 4, found 0)"),
        ({"sliding_window": -1}, "sliding_window (expected an integer from 1 to 2147483647, found -1)"),
        ({"max_position_embeddings": 0}, "max_position_embeddings (expected an integer from 1"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"layer_types": ["bogus", "full_attention"]}, "'bogus'"),
        ({"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}}, "'bogus'"),
        ({"dtype": "float99"}, "float99"),
        ({"dtype": 0}, "dtype (expected such as bfloat16, found 0)"),
        ({"dtype": "nn"}, "dtype (expected such as bfloat16, found <module 'torc"),
        ({"pad_token_id": 10**6}, "Padding_idx must be within num_embeddings"),
        ({"sub_configs": 1}, "sub_configs"),
        ({"eos_token_id": "x"}, "eos_token_id"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["run", "explain"])
def test_a_config_that_lies_is_named_with_the_value(
    cli: Cli, tiny: Path, tmp_path: Path, config: dict[str, Any], said: str, command: str
) -> None:
    path = changed(tiny, tmp_path / "lies", **config)
    error = error_of(cli(command, path, *(["hello"] if command == "run" else [])))
    assert str(path / "config.json") in error
    assert said in error


@pytest.mark.parametrize("beams", [["a"], -1, 0])
def test_beams_that_are_no_number(cli: Cli, tiny: Path, tmp_path: Path, beams: object) -> None:
    path = changed(tiny, tmp_path / "lies", num_beams=beams)
    said = f"the checkpoint's generation config has num_beams = {beams}, and beams are 1 or more"
    assert said in error_of(cli("run", path, "hello", "--max-new-tokens", "2"))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "llama"}, "num_hidden_layers (expected at most 1024, found 1000000000)"),
        # Lists of layers, and names of labels, are made with the config.
        ({"model_type": "jamba"}, "num_hidden_layers (expected at most 1024, found 1000000000)"),
        ({"model_type": "gpt2", "num_hidden_layers": 1, "n_layer": 2000}, "n_layer (expected at most 1024, found"),
        (
            {"model_type": "llama", "num_hidden_layers": 1, "num_labels": 10**18},
            "num_labels (expected at most 65536, found 1000000000000000000)",
        ),
        (
            {"model_type": "gemma3", "num_hidden_layers": 1, "text_config": {"num_hidden_layers": 10**9}},
            "num_hidden_layers (expected at most 1024, found 1000000000)",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_plain_config_of_a_billion_layers_is_not_built(
    cli: Cli, tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    sizes = {"num_hidden_layers": 10**9, "hidden_size": 64, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(sizes | config))
    assert f"{tmp_path / 'config.json'}: {why}" in error_of(cli("explain", tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"rms_norm_eps": "a" * 5000},
        {"layer_types": "a" * 5000},
        {"dtype": "a" * 5000},
        {"attn_implementation": "a" * 5000},
        {"rope_parameters": {"rope_type": "a" * 5000, "rope_theta": 1e4}},
        {"quantization_config": {"quant_method": "a" * 5000}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_value_of_a_whole_screen_is_never_shown_whole(
    cli: Cli, tiny: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    """Nor where transformers says it; its name, which comes first, is."""
    error = error_of(cli("explain", changed(tiny, tmp_path / "lies", **config)))
    assert len(error) < 400 + 2 * len(str(tmp_path)) + 200
    assert "..." in error
    assert str(tmp_path / "lies" / "config.json") in error


def test_a_value_that_keeps_tokens_from_being_replayed_is_not_shown_whole(
    cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    path = changed(tiny, tmp_path / "lies", output_attentions="a" * 5000)
    result = cli("run", path, "hello", "--max-new-tokens", "2")
    assert "the generation config has output_attentions = 'aaa" in result.stderr
    assert len(result.stderr) < 1000 + 2 * len(str(tmp_path))


def test_a_config_that_is_no_json_is_not_called_a_bad_tokenizer(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    path = changed(tiny, tmp_path / "broken")
    (path / "config.json").write_text("{")
    error = error_of(cli("run", path, "hello"))
    assert "config.json: invalid JSON" in error
    assert "tokenizer" not in error


def test_an_answer_of_nan_is_none(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = changed(tiny, tmp_path / "nan")
    state = {name: t.clone() for name, t in load_file(path / "model.safetensors").items()}
    state["model.norm.weight"].fill_(float("nan"))
    save_file(state, path / "model.safetensors")
    for options in ((), ("--temperature", "1")):
        assert "logits are NaN" in error_of(cli("run", path, "hello", "--max-new-tokens", "2", *options))


@pytest.mark.parametrize("device", ["zpu", "cuda:²", "cpu:1", "cpu:²", "cpu:99999999999999999999"])
@pytest.mark.parametrize("command", ["run", "eval"])
def test_a_device_that_is_not_here(cli: Cli, tiny: Path, command: str, device: str) -> None:
    error = error_of(cli(command, tiny, "--device", device))
    assert repr(device) in error or f"device {device}: this machine has 1" in error


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("bench", "kernels", "--m", "9" * 5000), "numbers from 1 to 1048576"),
        (("bench", "kernels", "--shape", "9" * 5000 + "x64"), "unknown shape '999"),
        (("bench", "kernels", "--shape", ","), "no shape is given"),
        (("bench", "kernels", "--format", ""), "no format is given"),
        (("explain", "--backend", ""), "unknown backend ''"),
        (("explain", "--device", ""), "no device ''"),
        (("explain", "--machine", "9" * 5000), "unknown machine '999"),
        (("explain", "--op", "linear", "--n", "64", "--layers", "3"), "--layers cuts a model"),
        (("run", "--device", ""), "unknown device ''"),
        (("run", "--device", "9" * 5000), "unknown device '999"),
        (("eval", "--text", "/dev/zero", "--formats", "none"), "/dev/zero: goes on behind 268435456 bytes"),
    ],
)
def test_a_value_that_says_nothing(cli: Cli, words: tuple[str, ...], why: str) -> None:
    """Neither the default, nor a whole screen, nor all of the memory."""
    result = cli(*words)
    assert result.exit_code == 2
    assert why in result.stderr
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 600


@pytest.mark.parametrize("command", [("run",), ("selftest",), ("bench", "kernels")])
@pytest.mark.parametrize("seed", ["-1", SEED_BEYOND, "9" * 30])
def test_a_seed_that_no_generator_takes(cli: Cli, command: tuple[str, ...], seed: str) -> None:
    result = cli(*command, "--seed", seed)
    assert result.exit_code == 2
    assert "--seed" in result.stderr


def test_a_prompt_that_is_not_text(cli: Cli, tiny: Path) -> None:
    assert "not utf-8" in error_of(cli("run", tiny, input=b"hello \xff"))
    assert "not UTF-8 from character 1 on" in error_of(cli("run", tiny, "a\udcff"))


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_cut_into_tokens(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microscale.cli.run._LONGEST", 5_000_000)
    assert "the prompt has 5000000 characters, and the model's context is" in error_of(
        cli("run", tiny, input="a" * 5_000_000)
    )
    assert "goes on behind 5000000 characters" in error_of(cli("run", tiny, input="a" * 5_000_001))


@pytest.mark.parametrize("name", ["MICROSCALE_DENSE", "MICROSCALE_EMULATION_TILE"])
def test_a_variable_that_says_nothing(
    cli: Cli, tiny: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "9" * 400)
    force = ("--backend", "emulation") if name.endswith("TILE") else ()
    assert f"{name}='999" in error_of(cli("run", tiny, "hello", *force))
    assert f"{name}='999" in cli("doctor").stdout


def test_nothing_is_measured_that_could_not_be_written(cli: Cli, tmp_path: Path) -> None:
    for command in (("bench", "kernels", "--save"), ("bench", "tune", "--out")):
        assert "is a directory" in error_of(cli(*command, tmp_path))
        assert "nothing can be written there" in error_of(cli(*command, "/proc/self/nothing.json"))


def test_the_smallest_shape_is_not_made_a_million_times() -> None:
    made = layers.Layers(parse_shape("1x1"), FORMATS["mxfp4"], 1 << 30, 1 << 34, torch.Generator())
    assert len(made.packed) == layers.MOST


def test_a_text_without_tokens_has_no_perplexity(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt: 0 tokens" in error_of(cli("eval", tiny, "--text", tmp_path / "empty.txt"))


def test_what_nobody_foresaw_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("one\ntwo")

    monkeypatch.setattr(doctor_module, "requirements", fail)
    said = "RuntimeError: one (not foreseen: --debug shows where)"
    for options, traceback in (((), False), (("--debug",), True), (("--json",), False)):
        with pytest.raises(SystemExit) as caught:
            main(["doctor", *options])
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        if "--json" in options:
            assert json.loads(out) == {"error": {"type": "RuntimeError", "message": said}}
        else:
            assert out == ""
        assert err.endswith(f"microscale: error: {said}\n")
        assert ("Traceback" in err) is traceback


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("command", [("--help",), ("explain", "--machine", "list", "--json")])
def test_a_full_disk_is_one_line(command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "microscale.cli", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("microscale: error: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="a shell's way to close a stream")
@pytest.mark.parametrize(
    ("closed", "code"), [("<&-", 2), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), ("<&- 2>&-", 2)]
)
def test_streams_that_a_shell_has_closed(tiny: Path, closed: str, code: int) -> None:
    """Without stdin the prompt is empty, if it is not among the words; what nobody reads is written nowhere."""
    prompt = "" if code else "'a b'"
    line = f"exec {sys.executable} -m microscale.cli run {tiny} {prompt} --max-new-tokens 2 {closed}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == code
    said = done.stderr.splitlines()
    if "2>" in closed:
        assert not said
    elif code:
        assert said == ["microscale: error: the prompt is empty"]
    else:
        assert len(said) == 1
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", "") and not code)
