"""`microscale explain`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from made import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS, document
from typer.testing import Result

import microscale.backends
import microscale.plan
from microscale.accumulation import HOPPER_FP8
from microscale.cli.explain import proven
from microscale.invented import INVENTED
from microscale.machine import detect
from microscale.oracle import Backend, Problem

Cli = Callable[..., Result]
SHAPE = ("--op", "linear", "--format", "mxfp4", "--n", "64", "--k", "64")
LONG = "it would need a kernel that nobody has written yet, on hardware that nobody has built yet, " * 3


def no_gpu(problem: Problem) -> str | None:
    return None if problem.device == "cuda" else f"it is for CUDA, not for {problem.device}"


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three backends that stay the same however the real table grows."""
    made = (
        Backend("picky", "", lambda p: LONG.strip(), "nothing at all"),
        Backend("fast", "", no_gpu, "fast products", proven="NVIDIA H200"),
        Backend("emulation", "", lambda p: None, "slow products", proven="x86 CPUs", waits=True),
    )
    monkeypatch.setattr(microscale.backends, "table", lambda: made)
    monkeypatch.setattr(microscale.plan, "table", lambda: made)


def test_a_model_without_weights(cli: Cli) -> None:
    result = cli("explain", "gpt-oss-20b", "--machine", "h200", "--machine", "zen5")
    assert result.exit_code == 0
    h200, zen5 = result.stdout.split("\n\n")
    assert h200.startswith("gpt-oss-20b on h200: NVIDIA H200 (sm_90, 141 GiB)\n")
    experts = next(line for line in h200.splitlines() if line.startswith("experts "))
    assert " ".join(experts.split()) == "experts 24 mxfp4 declared a16, run a16 fast 10.2 GB 1.27 GB"
    assert "total" in h200
    assert "13.8 GB    3.71 GB" in h200
    plain = "    activations stay bf16; products are summed in float32\n"
    assert f"  + fast: fast products\n{plain}    proven on this kind of hardware (NVIDIA H200)\n" in h200
    assert "  not asked, being behind it in the table: emulation\n" in h200
    assert "cache takes 49.2 kB for each token, and 24.6 kB once beyond the window of 128." in h200
    assert f"  + emulation: slow products\n{plain}    proven on this kind of hardware (x86 CPUs)\n" in zen5
    assert "  - fast: it is for CUDA, not for cpu\n" in zen5
    by_modules = "A generated token runs the model's modules: its experts by emulation, not by the core.\n"
    assert by_modules in zen5


def test_a_generated_token_on_a_cpu(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    made = (Backend("cpu", "", lambda p: None, "products on a CPU", proven="x86 CPUs"),)
    monkeypatch.setattr(microscale.plan, "table", lambda: made)
    text = cli("explain", "gpt-oss-20b", "--machine", "zen5").stdout
    starred = [line.partition("  ")[0] for line in text.splitlines() if "transformers *" in line]
    assert starred == ["embedding", "attention sinks"]
    assert "* in prompts; a generated token is one call of the C++ core for all layers: experts" in text
    assert "for a generated token:" not in text  # the linears' own backend, which is named
    assert "CUDA" not in text
    (machine,) = document(cli("explain", "gpt-oss-20b", "--machine", "zen5", "--json"))["machines"]
    assert machine["why_modules"] is None
    assert {layer["token_backend"] for layer in machine["layers"]} == {"cpu"}
    (machine,) = document(cli("explain", "gpt-oss-20b", "--machine", "plain-x86", "--json"))["machines"]
    assert machine["why_modules"] == "a Linear in it is PyTorch's"
    found = {layer["name"]: layer["token_backend"] for layer in machine["layers"]}
    assert (found["experts"], found["embedding"]) == ("cpu", "transformers")


def test_a_core_that_is_lowered_is_said_to_be(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    if not detect().core:
        pytest.skip(f"the C++ core is not in this installation: {detect().core_missing}")
    monkeypatch.undo()  # the real table
    monkeypatch.setenv("MICROSCALE_CPU_LEVEL", "plain")
    decoded = "decoded: weights become float32 in registers, and so do activations"
    found = document(cli("explain", *SHAPE, "--device", "cpu", "--json"))["machines"][0]
    assert found["machine"]["level"] == "plain"
    assert found["layers"][0]["arithmetic"] == decoded
    level = detect().level
    text = cli(
        "explain", *SHAPE, "--device", "cpu", "--machine", "this", "--machine", "sapphire-rapids"
    ).stdout
    assert (f"{level}, the C++ core at plain," in text) == (level != "plain")
    assert "AMX tiles multiply them" in text
    monkeypatch.setattr("microscale.backends.cpu_core._widest", lambda: 1)
    monkeypatch.setenv("MICROSCALE_CPU_LEVEL", "amx")
    assert "the widest level here is avx2" in cli("explain", *SHAPE).stderr


def test_what_is_never_replayed_is_not_said_to_be(cli: Cli, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 100}
    for name, more in (("plain", {"model_type": "stablelm"}), ("chunks", {"model_type": "llama"})):
        config = {**sizes, **more, **({"attention_chunk_size": 8} if name == "chunks" else {})}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    said = cli("explain", tmp_path / "plain", "--machine", "h200").stdout
    assert (
        "A generated token runs the model's modules, replayed from a CUDA graph: stablelm is none of" in said
    )
    said = cli("explain", tmp_path / "chunks", "--machine", "h200").stdout
    assert (
        "A generated token runs the model's modules: it has layers of chunked_attention, whose cache" in said
    )


def test_experts_that_wait_for_the_gpu_are_not_said_to_be_replayed(cli: Cli) -> None:
    waiting = "(emulation waits for the GPU to know which experts have rows)"
    forced = ("explain", "gpt-oss-20b", "--backend", "emulation")
    said = cli(*forced, "--machine", "h200").stdout
    assert (
        f"one chain of kernels, not replayed from a CUDA graph {waiting}: experts as above, and Triton's"
        in said
    )
    said = cli(*forced, "--machine", "mi300x").stdout
    assert (
        f"token runs the model's modules, not replayed from a HIP graph {waiting}: a token's kernels" in said
    )
    assert "CUDA graph" not in cli(*forced, "--machine", "zen5").stdout
    words = ("--machine", "h200", "--json")
    (machine,) = document(cli(*forced, *words))["machines"]
    assert (machine["why_modules"], machine["why_no_graph"]) == (None, waiting[1:-1])
    (machine,) = document(cli("explain", "gpt-oss-20b", *words))["machines"]
    assert machine["why_no_graph"] is None
    assert (
        "one chain of kernels, replayed from a CUDA graph: exp"
        in cli("explain", "gpt-oss-20b", *words[:2]).stdout
    )


def test_reasons_are_whole_lines_when_piped(cli: Cli) -> None:
    result = cli("explain", *SHAPE, "--machine", "mac")
    assert f"  - picky: {LONG.strip()}\n" in result.stdout


def test_untried_hardware_is_not_mistaken_for_tried(cli: Cli) -> None:
    result = cli("explain", *SHAPE, "--machine", "mac", "--machine", "b200")
    assert result.stdout.count("never run by us on this kind of hardware") == 2
    assert "(only on: NVIDIA H200); its canary decides at load" in result.stdout


def test_what_does_not_fit_is_said(cli: Cli) -> None:
    result = cli("explain", "gpt-oss-20b", "--machine", "arc-b580")
    assert "The weights (13.8 GB) DO NOT FIT in the 12 GiB (12.9 GB) of xpu memory." in result.stdout


def test_a_checkpoint_is_planned_from_its_headers(cli: Cli, bare: Path) -> None:
    found = document(cli("explain", bare, "--json", "--machine", "zen5"))
    layers = {layer["name"]: layer for layer in found["machines"][0]["layers"]}
    weights = LAYERS * EXPERTS * 3 * INTERMEDIATE * HIDDEN * 17 // 32
    biases = LAYERS * EXPERTS * (2 * INTERMEDIATE + HIDDEN) * 2
    assert layers["experts"]["stored_bytes"] == weights + biases
    assert layers["experts"]["read_bytes_per_token"] == (weights + biases) // 2
    assert found["stored_bytes"] == sum(layer["stored_bytes"] for layer in layers.values())


def test_the_json_has_all_that_the_text_has(cli: Cli) -> None:
    found = document(cli("explain", "gpt-oss-20b", "--machine", "h200", "--json"))
    assert found["model"] == "gpt-oss-20b"
    assert found["kv_cache"] == {
        "bytes_per_token": 49152,
        "bytes_per_token_beyond_window": 24576,
        "window": 128,
    }
    (machine,) = found["machines"]
    assert (machine["device"], machine["fits"]) == ("cuda", True)
    experts = machine["layers"][0]
    assert experts["act"] == {"declared": "a16", "run": "a16"}
    assert experts["backend"] == "fast"
    assert experts["proven"] == {"on": "NVIDIA H200", "here": True}
    assert experts["refused"] == [{"backend": "picky", "reason": LONG.strip()}]
    assert experts["not_asked"] == ["emulation"]
    assert machine["layers"][1]["backend"] == "transformers"
    assert "problem" not in machine["layers"][1]


def test_all_machines(cli: Cli) -> None:
    found = document(cli("explain", *SHAPE, "--all-machines", "--json"))
    assert [m["machine"]["name"] for m in found["machines"]] == ["this machine", *INVENTED]


def test_machines_are_listed(cli: Cli) -> None:
    lines = cli("explain", "--machine", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["this", *INVENTED]
    assert set(document(cli("explain", "--machine", "list", "--json"))) == {"this", *INVENTED}


def test_a_size_is_named_as_it_was_given(cli: Cli) -> None:
    sizes = ("--k", "0", "--experts", "1", "--top-k", "1", "--intermediate", "32")
    result = cli("explain", "--op", "moe", "--format", "mxfp4", *sizes)
    assert "moe needs k from 1" in result.stderr


@pytest.mark.parametrize(
    "rest",
    [SHAPE, ("gpt-oss-20b",), ("--machine", "h200"), ("--all-machines",), ("--act", "a8"), ("--with", "all")],
)
def test_a_list_of_machines_explains_nothing(cli: Cli, rest: tuple[str, ...]) -> None:
    result = cli("explain", "--machine", "list", *rest)
    assert result.exit_code == 2
    assert "only --json has a meaning" in result.stderr


def test_a_bare_moe(cli: Cli) -> None:
    sizes = ("--k", "2880", "--experts", "32", "--top-k", "4", "--intermediate", "2880")
    found = document(
        cli(
            "explain",
            "--op",
            "moe",
            "--format",
            "mxfp4",
            *sizes,
            "--act",
            "a8",
            "--machine",
            "h200",
            "--json",
        )
    )
    (layer,) = found["machines"][0]["layers"]
    assert layer["act"] == {"declared": None, "run": "mxfp8_e4m3"}
    assert layer["stored_bytes"] == 32 * 3 * 2880 * 2880 * 17 // 32
    assert layer["read_bytes_per_token"] == layer["stored_bytes"] // 8


def test_a_forced_backend_that_refuses_is_exit_code_1(cli: Cli) -> None:
    result = cli("explain", *SHAPE, "--machine", "mac", "--backend", "fast")
    assert result.exit_code == 1
    assert (
        "no backend: every one refused\n  - picky: not the forced one (fast)\n  - fast: it is"
        in result.stdout
    )


def test_the_variable_forces_a_backend_too(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROSCALE_BACKEND", "emulation")
    assert "- fast: not the forced one (emulation)" in cli("explain", *SHAPE, "--machine", "h200").stdout


def test_a_device_of_the_machine(cli: Cli) -> None:
    result = cli("explain", *SHAPE, "--machine", "h200", "--device", "cpu")
    assert "on h200: Intel Xeon Platinum 8480+ (amx, 56 cores, 512 GiB)" in result.stdout
    assert cli("explain", *SHAPE, "--machine", "h200", "--device", "xpu").exit_code == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--machine", "h20"), "unknown machine 'h20'; did you mean h200? known: this, avx2-laptop"),
        (("--with", "humm"), "unknown package 'humm'; did you mean humming? known: all, triton, humming"),
        (("--backend", "fats"), "unknown backend 'fats'; did you mean fast? known: picky, fast, emulation"),
        (("--act", "a5"), "unknown activation format 'a5'; known: a16, a8, a6, a4, mxfp4"),
        (("--act", "fp8_block128"), "unknown activation format 'fp8_block128'"),
        (("--n", "4"), "--n describes one layer: add --op linear or --op moe"),
        (("--op", "linear", "--format", "mxfp4", "--n", "4"), "--op linear needs --k"),
        (
            ("--op", "moe", "--format", "mxfp4", "--k", "4"),
            "--op moe needs --experts, --top-k, --intermediate",
        ),
        ((*SHAPE, "--experts", "4"), "--op linear has no --experts"),
        (("--op", "liner", "--format", "mxfp4"), "unknown op 'liner'; did you mean linear?"),
        (
            ("--op", "linear", "--format", "mxfp", "--n", "1", "--k", "1"),
            "unknown format 'mxfp'; did you mean mxfp4?",
        ),
        (("some-model", *SHAPE), "give a model or --op, not both"),
        (("gpt-oss-20",), "not a bundled name (stdlib-moe, gpt-oss-20b, gpt-oss-120b)"),
    ],
)
def test_what_is_wrong_is_said(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    result = cli("explain", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    "text, machine, device, expected",
    [
        ("NVIDIA H200", "h200", "cuda", True),
        ("NVIDIA H200", "h200", "cpu", False),
        ("NVIDIA H200", "b200", "cuda", False),
        ("sm_90 and sm_100", "b200", "cuda", True),
        ("A100", "a100", "cuda", True),
        ("MI300X", "mi355x", "rocm", False),
        ("x86 CPUs", "zen5", "cpu", True),
        ("AMD EPYC (avx512_bf16)", "zen5", "cpu", True),
        ("AMD EPYC (avx512_bf16)", "sapphire-rapids", "cpu", False),
        ("x86 CPUs", "mac", "cpu", False),
        ("", "h200", "cuda", False),
    ],
)
def test_proven(text: str, machine: str, device: str, expected: bool) -> None:
    backend = Backend("b", "", lambda p: None, "", proven=text)
    assert proven(backend, INVENTED[machine], device) is expected


def needs_flashinfer(problem: Problem) -> str | None:
    return (
        None if "flashinfer-python" in problem.packages else "the package flashinfer-python is not installed"
    )


def test_as_if_a_package_were_installed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        Backend("flashinfer", "", needs_flashinfer, "quick", accumulation=lambda p: HOPPER_FP8),
        Backend("emulation", "", lambda p: None, "slow"),
    )
    monkeypatch.setattr(microscale.plan, "table", lambda: made)
    monkeypatch.setattr(microscale.backends, "table", lambda: made)
    without = cli("explain", *SHAPE, "--machine", "b200").stdout
    assert "- flashinfer: the package flashinfer-python is not installed" in without
    assert "as if installed" not in without
    for word in ("flashinfer", "flashinfer-python", "all"):
        found = cli("explain", *SHAPE, "--machine", "b200", "--with", word).stdout
        assert "flashinfer-python 0.7.2.post1" in found.split("as if installed:")[1].splitlines()[0]
        assert "triton" not in found.split("as if installed:")[1].splitlines()[0]  # it is there anyway
        assert (
            "  + flashinfer: quick\n    activations stay bf16; products are summed by FP8 tensor cores"
            in found
        )
        assert "never run by us on any hardware; its canary decides at load" in found


def test_the_json_has_numerics_and_what_was_assumed(cli: Cli) -> None:
    found = document(
        cli("explain", *SHAPE, "--act", "a8", "--machine", "h200", "--with", "humming", "--json")
    )
    (machine,) = found["machines"]
    assert machine["machine"]["assumed"] == ["humming-kernels"]
    assert machine["machine"]["packages"]["humming-kernels"] == "0.1.19"
    numerics = "activations are quantised to mxfp8_e4m3; products are summed in float32"
    assert machine["layers"][0]["numerics"] == numerics


def test_names_of_machines_are_data(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = replace(INVENTED["mac"], name="[red]strange[/red]")
    monkeypatch.setattr("microscale.invented.INVENTED", {"strange": strange})
    assert "on [red]strange[/red]: Apple" in cli("explain", *SHAPE, "--machine", "strange").stdout
