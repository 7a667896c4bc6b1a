"""`microscale eval`, on tiny models with random weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS, document
from transformers import AutoTokenizer
from typer.testing import Result

import microscale
from microscale import FORMATS, FormatError
from microscale.cli.eval import plus_minus
from microscale.integrations.hf.requantize import dequantize_model
from microscale.perplexity import perplexity

Cli = Callable[..., Result]
TEXT = "for name, value in sorted(items): print(name, value)  # µ is two bytes\n" * 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def master(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's own numbers, unpacked, in bf16: quantising them to MXFP4 changes none."""
    path = tmp_path_factory.mktemp("master") / "master"
    dequantize_model(microscale.load(tiny, device="cpu", backend="emulation")).save_pretrained(path)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {v["name"]: v for v in found["variants"]}


def test_as_shipped_is_the_perplexity_of_the_model(cli: Cli, tiny: Path, text: Path) -> None:
    found = document(cli("eval", tiny, "--text", text, "--formats", "none", "--json"))
    shipped, unpacked = found["variants"]
    ids = torch.tensor(AutoTokenizer.from_pretrained(tiny)(TEXT)["input_ids"])
    model = microscale.load(tiny, dtype=torch.float32, device="cpu")
    wanted = perplexity(model, ids, 96)  # the model's context
    assert (found["tokens"], found["window"], found["text_bytes"]) == (
        len(ids) - 1,
        96,
        len(TEXT.encode()) - 1,
    )
    assert shipped["nll"] == pytest.approx(wanted.nll, abs=1e-5)
    assert shipped["perplexity"] == pytest.approx(math.exp(wanted.nll), rel=1e-5)
    assert shipped["bits_per_byte"] == pytest.approx(wanted.nll / math.log(2))  # a token is a byte
    weights = LAYERS * EXPERTS * 3 * INTERMEDIATE * HIDDEN
    assert (shipped["weights"], shipped["bits_per_weight"]) == (weights, 4.25)
    assert shipped["quantised"] == "experts mxfp4"
    assert (shipped["change"], shipped["sqnr_db"]) == (0, None)
    # The same numbers as dense weights, through transformers' own experts.
    assert (unpacked["name"], unpacked["quantised"]) == ("unpacked to bf16", "nothing")
    assert unpacked["nll"] == pytest.approx(shipped["nll"], abs=1e-5)


def test_all_formats_from_the_shipped_weights(cli: Cli, tiny: Path, text: Path) -> None:
    found = document(cli("eval", tiny, "--text", text, "--max-tokens", "100", "--json"))
    variants = by_name(found)
    assert list(variants) == ["as shipped", "unpacked to bf16", *FORMATS]
    assert found["tokens"] == 100
    for name, fmt in FORMATS.items():
        v = variants[name]
        assert v["quantised"] == "experts, linear"
        assert v["bits_per_weight"] == pytest.approx(
            fmt.bits_per_weight, rel=0.02
        )  # tensor scales, part blocks
        assert v["sqnr_db"] > 15
        assert v["change"] == pytest.approx(v["perplexity"] / variants["as shipped"]["perplexity"] - 1)
    assert variants["mxfp8_e4m3"]["sqnr_db_by_group"]["experts"] is None  # exact, which JSON cannot say
    assert variants["mxint8"]["sqnr_db"] > variants["mxfp4"]["sqnr_db"]


def test_from_a_master(cli: Cli, tiny: Path, master: Path, text: Path) -> None:
    options = ("--text", text, "--max-tokens", "60", "--master", master, "--formats", "mxfp4,mxfp8_e4m3")
    found = document(cli("eval", tiny, *options, "--what", "experts", "--json"))
    base, shipped, *rest = found["variants"]
    assert (base["name"], base["quantised"], base["bits_per_weight"]) == ("bf16 master", "nothing", 16)
    for v in (shipped, *rest):  # the same numbers, whoever quantised them
        assert v["nll"] == pytest.approx(base["nll"], abs=1e-5)
        assert v["sqnr_db_by_group"] == {"experts": None}
    lines = cli("eval", tiny, *options, "--what", "experts").stdout.splitlines()
    assert [line.split()[-1] for line in lines[2:5]] == ["exact"] * 3


def test_a_master_with_other_numbers(cli: Cli, tiny: Path, text: Path, tmp_path: Path) -> None:
    model = dequantize_model(microscale.load(tiny, device="cpu", backend="emulation"))
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data.mul_(1.1)
    model.save_pretrained(tmp_path)
    options = ("--text", text, "--max-tokens", "60", "--master", tmp_path, "--formats", "mxfp8_e4m3,mxint8")
    base, shipped, *rest = document(cli("eval", tiny, *options, "--what", "experts", "--json"))["variants"]
    # Of three matrices one is off by a tenth: (1 + 1 + 1.1 squared) / (0.1 squared).
    assert shipped["sqnr_db"] == pytest.approx(25.1, abs=0.3)
    assert abs(shipped["change"]) > 1e-3
    for v in rest:  # made from the master
        assert v["sqnr_db"] > 30
        assert abs(v["nll"] - base["nll"]) < abs(shipped["nll"] - base["nll"])


def test_activations_count(cli: Cli, tiny: Path, text: Path) -> None:
    options = ("--text", text, "--max-tokens", "60", "--formats", "none", "--json")
    plain, coarse = (document(cli("eval", tiny, *options, "--act", act)) for act in ("a16", "a4"))
    assert plain["variants"][0]["nll"] != coarse["variants"][0]["nll"]
    assert coarse["act"] == "a4"


def test_markdown(cli: Cli, tiny: Path, text: Path) -> None:
    options = ("--text", text, "--max-tokens", "60", "--window", "10", "--formats", "nvfp4")
    result = cli("eval", tiny, *options, "--markdown")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.count("|") for line in table] == [8] * 5
    assert [line.split("|")[1].strip() for line in table] == [
        "weights",
        "---",
        "as shipped",
        "unpacked to bf16",
        "nvfp4",
    ]
    assert " ± " in table[4]
    assert "on 60 tokens (60 bytes) of some.txt, in windows of 10;" in lines[-1]
    assert result.stderr == ""  # no bars where there is no terminal


def test_a_format_that_does_not_fit_is_said(
    cli: Cli, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, fmt: str, **options: Any) -> Any:
        if fmt == "mxfp4":
            raise FormatError("mlp: K = 80 is no multiple")
        return real(model, fmt, **options)

    real = microscale.requantize
    monkeypatch.setattr(microscale, "requantize", refuse)
    options = ("--text", text, "--max-tokens", "20")
    found = document(cli("eval", tiny, *options, "--json"))
    assert found["refused"] == {"mxfp4": "mlp: K = 80 is no multiple"}
    assert len(found["variants"]) == 2 + len(FORMATS) - 1
    asked = cli("eval", tiny, *options, "--formats", "mxfp4")
    assert (asked.exit_code, asked.stdout) == (2, "")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--formats", "mxfp5"), "unknown format 'mxfp5'; did you mean mxfp4?"),
        (("--act", "a7"), "unknown activation format 'a7'"),
        (("--dtype", "fp8"), "unknown dtype 'fp8'"),
        (("--backend", "abacus"), "unknown backend 'abacus'"),
        (("--window", "97"), "--window 97: the model's context is 96"),
        (("--markdown", "--json"), "--markdown or --json, not both"),
        (("--what", "nonsense", "--formats", "mxfp4"), "'nonsense' matches no experts or nn.Linear"),
        (("--text", "/no/such/file"), "/no/such/file: No such file or directory"),
        (("--master", "/no/such/directory"), "no such directory"),
    ],
)
def test_errors(cli: Cli, tiny: Path, text: Path, options: tuple[str, ...], message: str) -> None:
    given = options if "--text" in options else (*options, "--text", text)
    result = cli("eval", tiny, *given)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_without_a_tokenizer(cli: Cli, bare: Path, text: Path) -> None:
    result = cli("eval", bare, "--text", text)
    assert result.exit_code == 2
    assert "has no tokenizer" in result.stderr


def test_an_error_shows_how_many_digits_mean_something() -> None:
    assert plus_minus(12.34567, 0.0678) == "12.346 ± 0.068"
    assert plus_minus(5.58231, 0.321, digits=4) == "5.5823 ± 0.32"
    assert plus_minus(2872.4, 163.0) == "2872 ± 163"
    assert plus_minus(-0.5, math.nan) == "-0.5"
    assert plus_minus(0.0, 0.0) == "0"
