"""Checkpoints and names that somebody got wrong: one line that says what, and no guess."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made import add_tokenizer, document
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import Result

from microscale.checkpoints import write

Cli = Callable[..., Result]
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "eos_token_id": None,
}
OTHER = "not of the shape that config.json says (expected"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint with a tokenizer."""
    path = tmp_path_factory.mktemp("llama") / "llama"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(path)
    return add_tokenizer(path)


def copied(of: Path, to: Path, **files: str) -> Path:
    shutil.copytree(of, to)
    for name, text in files.items():
        (to / f"{name}.json").write_text(text)
    return to


def configured(of: Path, to: Path, **changes: Any) -> Path:
    return copied(of, to, config=json.dumps(json.loads((of / "config.json").read_text()) | changes))


def error_of(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("microscale: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vocab_size": 10}, f"embed_tokens.weight': {OTHER} [10, 64], found"),
        ({"vocab_size": 10**12}, f"embed_tokens.weight': {OTHER} [1000000000000, 64], found"),
        ({"num_key_value_heads": 4}, f"k_proj.weight': {OTHER} [64, 64], found"),
        ({"head_dim": 0}, "transformers cannot build a model by it: ZeroDivisionError"),
        ({"attn_implementation": "flash_attention_2"}, "cannot build a model by it: ImportError: FlashAttention2"),
        ({"quantization_config": []}, "config.json: quantization_config (expected a quant_method, found [])"),
        ({"is_encoder_decoder": True}, "transformers does not generate by these settings, or the checkpoint's: "),
    ],
)  # fmt: skip
def test_a_config_that_is_of_another_model(
    cli: Cli, llama: Path, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    path = configured(llama, tmp_path / "model", **changes)
    assert why in error_of(cli("run", path, "abc", "--max-new-tokens", "2"))


def test_integers_are_no_numbers_of_a_bias(cli: Cli, llama: Path, tmp_path: Path) -> None:
    path = configured(llama, tmp_path / "model", attention_bias=True)
    state = load_file(path / "model.safetensors")
    for name, t in list(state.items()):
        if "self_attn" in name:
            state[name.replace("weight", "bias")] = torch.ones(t.shape[0], dtype=torch.int8)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    why = (
        "q_proj.bias': quantised, but config.json does not say how (expected torch.float32, found torch.int8)"
    )
    assert why in error_of(cli("run", path, "abc", "--max-new-tokens", "2"))


@pytest.mark.parametrize("number", [1, 3])
def test_experts_one_by_one_of_which_one_is_missing(cli: Cli, tmp_path: Path, number: int) -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **moe)).save_pretrained(tmp_path / "whole")
    state = load_file(tmp_path / "whole" / "model.safetensors")
    del state[f"model.layers.1.mlp.experts.{number}.down_proj.weight"]
    write(tmp_path / "model", json.loads((tmp_path / "whole" / "config.json").read_text()), state)
    why = f"experts.{number}.down_proj.weight': missing (expected 4 of them, found 3)"
    assert why in error_of(cli("run", tmp_path / "model", "1 2", "--max-new-tokens", "2"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "generation_config.json: invalid JSON"),
        ("[]", "generation_config.json: JSON is not an object"),
        ('{"temperature": "hot", "do_sample": true}', "or the checkpoint's: `temperature` (=hot) has to be"),
        ('{"eos_token_id": "x"}', "transformers does not generate by these settings, or the checkpoint's"),
        ('{"eos_token_id": []}', "or the checkpoint's: "),
        ('{"max_new_tokens": "x"}', "generation_config.json: transformers does not take it: TypeError: "),
        (
            '{"cache_implementation": "x"}',
            "generation_config.json: transformers does not take it: ValueError: ",
        ),
        ('{"exponential_decay_length_penalty": {}}', "or the checkpoint's: KeyError: 0"),
        # A list of so many empty ones.
        (
            '{"encoder_no_repeat_ngram_size": 10000000000}',
            "ngram_size (expected at most 65536, found 10000000000)",
        ),
    ],
)
def test_a_generation_config_that_says_nothing(
    cli: Cli, llama: Path, tmp_path: Path, text: str, why: str
) -> None:
    path = copied(llama, tmp_path / "model", generation_config=text)
    assert why in error_of(cli("run", path, "abc", "--max-new-tokens", "2"))


def test_a_tokenizer_that_takes_prompts_of_no_length(cli: Cli, llama: Path, tmp_path: Path) -> None:
    settings = json.loads((llama / "tokenizer_config.json").read_text()) | {"model_max_length": "x"}
    path = copied(llama, tmp_path / "model", tokenizer_config=json.dumps(settings))
    why = "model_max_length of its tokenizer (expected a number, found 'x')"
    assert why in error_of(cli("run", path, "abc", "--max-new-tokens", "2"))


def test_beams_of_a_generation_config_are_one_and_that_is_said(cli: Cli, llama: Path, tmp_path: Path) -> None:
    """Beams have no text until their end, and text comes as it is made."""
    path = copied(llama, tmp_path / "model", generation_config='{"num_beams": 4}')
    words = ("abc", "--max-new-tokens", "5", "--json")
    assert document(cli("run", path, *words))["ids"] == document(cli("run", llama, *words))["ids"]
    assert "by one beam, of the 4 that its generation config asks for" in cli("run", path, *words[:-1]).stderr
    assert "beam" not in cli("run", llama, *words[:-1]).stderr


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ 1/0 }}", "fails: division by zero"),
        ("{{ messages[7].role }}", "fails: list object has no element 7"),
        ("{{ {}['a'].b }}", "fails: 'dict object' has no attribute 'a'"),
        ("{% if", "fails: unexpected 'end of template'"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("", "the prompt is empty"),
    ],
)
def test_a_chat_template_that_fails(cli: Cli, chatty: Path, tmp_path: Path, template: str, why: str) -> None:
    path = copied(chatty, tmp_path / "model")
    (path / "chat_template.jinja").write_text(template)
    assert why in error_of(cli("run", path, "abc"))


@pytest.mark.parametrize("command", ["run", "inspect", "explain", "eval"])
def test_a_name_that_no_model_has(cli: Cli, command: str) -> None:
    """An empty one, of a variable that is not set, is not the bundled model's."""
    words = ("1 2",) if command == "run" else ()
    assert "error: '': no such directory" in error_of(cli(command, "", *words))
    error = error_of(cli(command, "x" * 5000, *words))
    assert "xxx...: no such directory" in error
    assert len(error) < 400


def test_a_number_of_thousands_of_digits_is_no_token(cli: Cli, bare: Path) -> None:
    assert "token ids from 0 to 259" in error_of(cli("run", bare, "1" * 5000))
    ids = document(cli("run", bare, "0" * 50 + "7", "--max-new-tokens", "1", "--json"))["prompt_ids"]
    assert ids == [7]


def test_the_coldest_temperature_is_the_likeliest_token(cli: Cli, tiny: Path) -> None:
    words = ("run", tiny, "abc", "--max-new-tokens", "8", "--json", "--temperature")
    wanted = document(cli(*words, "0"))["ids"]
    for temperature in ("1e-300", "1e-7"):
        found = document(cli(*words, temperature))
        assert (found["ids"], found["samples"]) == (wanted, False)
    assert document(cli(*words, "1e-6"))["samples"]


def test_what_nothing_reads_is_said(llama: Path, tmp_path: Path) -> None:
    """A layer too few in config.json would be another model without a word."""
    path = configured(llama, tmp_path / "model", num_hidden_layers=1)
    words = [sys.executable, "-m", "microscale.cli", "run", str(path), "abc", "--max-new-tokens", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    first, *rest = done.stderr.splitlines()
    assert first == (
        f"microscale: warning: {path}: 9 tensors that the model of its config.json has no use for, "
        "such as 'model.layers.1.input_layernorm.weight'"
    )
    assert len(rest) == 1
