"""`microscale run`: on tiny models with random weights, whose text means nothing but whose bytes must add up."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made import LAYERS, document
from typer.testing import Result

from microscale import Decoder, load
from microscale.backends.cpu_rules import refuse_device
from microscale.cli.generate import Settings, generate
from microscale.cli.run import PROMPT, _waiting_on_stdin
from microscale.cli.session import _proofs
from microscale.machine import Gpu, detect

Cli = Callable[..., Result]


def test_a_prompt_is_completed_and_reported(cli: Cli, tiny: Path) -> None:
    found = document(cli("run", tiny, "abc", "--max-new-tokens", "5", "--json"))
    assert found["prompt"] == "abc"
    assert len(found["prompt_ids"]) == 3
    assert len(found["ids"]) == 5
    assert (found["stopped"], found["samples"], found["device"]) == ("length", False, "cpu")
    experts, *linears = found["layers"]
    if detect().core:
        (linears,) = linears  # q, k, v, o and the router of each layer, and lm_head
        assert (linears["name"], linears["count"], linears["backend"]) == ("linears", 5 * LAYERS + 1, "cpu")
        assert (linears["format"], linears["refused"]) == ("bf16", [])
    assert (experts["name"], experts["count"], experts["format"]) == ("experts", LAYERS, "mxfp4")
    assert sum(experts["canary"].values()) == LAYERS
    assert all(verdict.startswith("canary passed at 0.") for verdict in experts["canary"])
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_text_goes_to_stdout_and_timings_to_stderr(cli: Cli, tiny: Path) -> None:
    wanted = document(cli("run", tiny, "abc", "--max-new-tokens", "5", "--json"))["text"]
    result = cli("run", tiny, "abc", "--max-new-tokens", "5")
    assert result.exit_code == 0
    assert result.stdout == wanted + "\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{tiny} on cpu: experts by ")
    assert "prompt 3 tokens at" in line
    assert "5 new at" in line
    assert "loaded in" in line
    assert "seed" not in line


def test_of_canaries_that_differ_the_worst_is_said_and_of_how_many_layers() -> None:
    """Equal sentences of several layers are one, so that sentences are no count of canaries."""
    said = {
        f"canary passed at 0.0{digit} of the permitted error": layers
        for digit, layers in ((5, 1), (7, 2), (6, 3))
    }
    layer = {"name": "experts", "count": 6, "refused": [], "canary": said}
    assert _proofs(layer) == "the worst of 6 layers: canary passed at 0.07 of the permitted error"
    alike = layer | {"canary": {"canary passed at 0.05 of the permitted error": 6}}
    assert _proofs(alike) == "canary passed at 0.05 of the permitted error"


def test_a_model_generates_with_nobody_listening_in(tiny: Path) -> None:
    """A hook of ours would keep a model's own step from being taken, and an argument its graph, without a word."""

    class Seen(Decoder):
        def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **arguments: Any) -> torch.Tensor:
            assert self._refuse_call(input_ids, arguments) is None
            for module in self.model.modules():
                assert not module._forward_hooks
                assert not module._forward_pre_hooks
                assert "forward" not in module.__dict__
            asked.append(arguments)
            return super().generate(input_ids, max_new_tokens, **arguments)

    asked: list[Any] = []
    result = generate(Seen(load(tiny)), None, [1, 2, 3], Settings(4, 0.0), lambda _: None)
    assert len(asked) == 1
    assert len(result.ids) == 4


def test_timing_says_where_a_tokens_time_goes(cli: Cli, tiny: Path) -> None:
    options = ("--max-new-tokens", "8", "--device", "cpu", "--timing")
    if not detect().core:
        assert detect().core_missing in cli("run", tiny, "abc", *options).stderr
        pytest.skip(f"the C++ core is not in this installation: {detect().core_missing}")
    found = document(cli("run", tiny, "abc", *options, "--json"))
    timing, (plan,) = found["timing"], document(cli("explain", tiny, "--json"))["machines"]
    assert set(timing["kernel_seconds"]) == {"experts", "linears", "attention", "norms"}
    assert min(timing["kernel_seconds"].values()) > 0
    assert timing["token_seconds"] == pytest.approx(found["seconds"]["decode"] / 7, rel=0.05)
    whole = sum(timing["kernel_seconds"].values()) + timing["outside_seconds"]
    assert whole == pytest.approx(timing["token_seconds"])
    assert timing["outside_seconds"] > 0
    assert timing["weight_bytes_per_token"] == sum(c["read_bytes_per_token"] for c in plan["layers"])
    floor = timing["weight_bytes_per_token"] / timing["ceiling_read_rate"]
    assert timing["of_floor"] == pytest.approx(floor / timing["token_seconds"])
    first, second = cli("run", tiny, "abc", *options).stderr.splitlines()
    assert "8 new at" in first
    assert second.startswith("  a token takes ")
    assert "all else" in second
    assert "timing" not in document(cli("run", tiny, "abc", "--max-new-tokens", "2", "--json"))


@pytest.mark.parametrize(
    "kind, why",
    [
        ("xpu", "--timing knows CPUs and CUDA, and the model would run on xpu"),
        ("cuda", "--timing looks at Triton's kernels: the package triton is not installed"),
    ],
)
def test_timing_is_refused_where_it_cannot_look(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch, kind: str, why: str
) -> None:
    gpu = replace(detect(), gpus=(Gpu(kind, "sm_90", "a GPU", 1 << 37),), packages=())
    monkeypatch.setattr("microscale.machine.detect", lambda: gpu)
    result = cli("run", tiny, "abc", "--timing")
    assert result.exit_code == 2
    assert why in result.stderr


def test_how_tokens_are_computed_is_said(cli: Cli, tiny: Path) -> None:
    options = ("--max-new-tokens", "4", "--device", "cpu")
    off = "replaying steps is switched off"
    found = document(cli("run", tiny, "abc", *options, "--no-graph", "--json"))
    assert found["graph"] == {"replayed": False, "fused": False, "why_not": off, "why_modules": None}
    assert f"steps of its modules: {off}" in cli("run", tiny, "abc", *options, "--no-graph").stderr
    found = document(cli("run", tiny, "abc", *options, "--json"))["graph"]
    if detect().core:
        assert found == {"replayed": True, "fused": True, "why_not": None, "why_modules": None}
        assert "steps of one chain of kernels" in cli("run", tiny, "abc", *options).stderr
    else:
        assert found == {
            "replayed": False,
            "fused": False,
            "why_not": refuse_device("cpu", core=False),
            "why_modules": None,
        }


def test_a_prompt_comes_through_a_pipe(cli: Cli, tiny: Path) -> None:
    found = document(cli("run", tiny, "--max-new-tokens", "2", "--json", input="from a pipe"))
    assert found["prompt"] == "from a pipe"


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(cli: Cli, tiny: Path, bare: Path, prompt: str) -> None:
    """Of a model without a tokenizer, too: nothing given is random ids, and "" is not nothing given."""
    result = cli("run", bare, prompt, "--json")
    assert result.exit_code == 2
    assert document(result) == {"error": {"type": "PromptError", "message": "the prompt is empty"}}
    result = cli("run", tiny, "", "--json")
    assert document(result)["error"]["type"] == "PromptError"


def test_an_empty_pipe_is_refused(cli: Cli, tiny: Path) -> None:
    result = cli("run", tiny, "--json", input="")
    assert result.exit_code == 2
    assert "the prompt is empty" in result.stderr


def test_sampling_depends_on_the_seed_alone(cli: Cli, tiny: Path) -> None:
    def ids(seed: int) -> list[int]:
        options = ("--max-new-tokens", "12", "--temperature", "2", "--seed", str(seed), "--json")
        found = document(cli("run", tiny, "abc", *options))
        assert (found["seed"], found["samples"]) == (seed, True)
        return list(found["ids"])

    assert ids(1) == ids(1) != ids(2)


def test_temperature_0_is_greedy(cli: Cli, tiny: Path) -> None:
    greedy, default = (
        document(cli("run", tiny, "abc", "--max-new-tokens", "6", "--json", *more))["ids"]
        for more in (("--temperature", "0", "--seed", "9"), ())
    )
    assert greedy == default


def test_a_seed_that_was_drawn_is_told(cli: Cli, tiny: Path) -> None:
    result = cli("run", tiny, "abc", "--max-new-tokens", "2", "--top-p", "0.5")
    assert "; seed " in result.stderr


def test_tokens_stop_at_the_end_of_the_context(cli: Cli, tiny: Path) -> None:
    found = document(cli("run", tiny, "a" * 90, "--max-new-tokens", "50", "--json"))
    assert len(found["ids"]) == 6
    too_long = cli("run", tiny, "a" * 96)
    assert too_long.exit_code == 2
    assert "the prompt has 96 tokens, and the model's context is 96" in too_long.stderr


def test_without_arguments_the_bundled_model_completes_a_built_in_prompt(
    cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microscale.models.BUNDLED", str(tiny))
    short = PROMPT[:40]
    monkeypatch.setattr("microscale.cli.run.PROMPT", short)
    result = cli("run", "--max-new-tokens", "3")
    assert result.exit_code == 0
    assert result.stdout.startswith(short)
    assert "; seed 0; " in result.stderr


def test_without_arguments_stdin_is_read_if_something_waits_there(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert _waiting_on_stdin() is None  # open, and nobody writes: must not hang
        os.write(write, b"hello")
        os.close(write)
        assert _waiting_on_stdin() == "hello"
    monkeypatch.setattr(sys, "stdin", io.StringIO("not a file"))
    assert _waiting_on_stdin() is None


def test_a_chat_template_is_used_where_there_is_one(cli: Cli, chatty: Path, tiny: Path) -> None:
    found = document(cli("run", chatty, "hi", "--max-new-tokens", "2", "--json"))
    assert found["prompt"] == "[user]hi[assistant]"
    plain = document(cli("run", chatty, "hi", "--no-chat", "--max-new-tokens", "2", "--json"))
    assert plain["prompt"] == "hi"
    refused = cli("run", tiny, "hi", "--chat")
    assert refused.exit_code == 2
    assert "has no chat template" in refused.stderr


def test_a_model_without_a_tokenizer_speaks_ids(cli: Cli, bare: Path) -> None:
    result = cli("run", bare, "1 2 3", "--max-new-tokens", "4")
    ids = document(cli("run", bare, "1 2 3", "--max-new-tokens", "4", "--json"))["ids"]
    assert result.stdout == " ".join(map(str, ids)) + " \n"
    random = document(cli("run", bare, "--max-new-tokens", "4", "--seed", "3", "--json"))
    assert len(random["prompt_ids"]) == 16
    words = cli("run", bare, "hello")
    assert words.exit_code == 2
    assert "token ids from 0 to 259, such as '17 4 96'" in words.stderr
    assert cli("run", bare, "260").exit_code == 2


def test_ids_are_looked_at_before_a_model_is_loaded(
    cli: Cli, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded for a prompt that it cannot take")

    monkeypatch.setattr("microscale.cli.session.load", loads)
    assert "token ids from 0 to 259" in cli("run", bare, "Hello there").stderr


def test_dummy_weights_need_a_config_only(cli: Cli, bare: Path, tmp_path: Path) -> None:
    config = tmp_path / "config-only"
    config.mkdir()
    (config / "config.json").write_bytes((bare / "config.json").read_bytes())
    found = document(
        cli("run", config, "--load-format", "dummy", "--layers", "1", "--max-new-tokens", "3", "--json")
    )
    assert found["layers"][0]["count"] == 1
    assert len(found["ids"]) == 3
    assert "--load-format dummy" in cli("run", config, "1 2").stderr


def test_the_canary_can_be_switched_off_and_doubled(cli: Cli, bare: Path) -> None:
    def verdicts(word: str) -> dict[str, int]:
        found = document(cli("run", bare, "1", "--max-new-tokens", "1", "--canary", word, "--json"))
        return dict(found["layers"][0]["canary"])

    assert verdicts("off") == {"not proved: the canary is off": LAYERS}
    assert sum(n for verdict, n in verdicts("all").items() if "passed" in verdict) == LAYERS


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--backend", "emulatoin"), "unknown backend 'emulatoin'; did you mean emulation?"),
        (("--act", "a7"), "unknown activation format 'a7'"),
        (("--device", "abacus"), "unknown device 'abacus'; known: cpu"),
        (("--canary", "on"), "unknown canary 'on'"),
        (("--load-format", "dumy"), "did you mean dummy?"),
        (("--layers", "1"), "layers can be cut with load_format='dummy' only"),
    ],
)
def test_what_is_wrong_is_said(cli: Cli, bare: Path, arguments: tuple[str, ...], message: str) -> None:
    result = cli("run", bare, "1", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_broken_tokenizer_is_an_error_of_its_own(cli: Cli, bare: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in bare.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "tokenizer.json").write_text('{"version": "1.0"}')
    result = cli("run", broken, "x")
    assert result.exit_code == 2
    assert "its tokenizer cannot be read" in result.stderr
