"""What a plan says of a generated token on a CPU, against what a `Decoder` says of the same model, loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from microscale.backends import token_rules
from microscale.backends.cpu_rules import refuse_device
from microscale.backends.dense_rules import CORE, HOST
from microscale.integrations.hf.architectures import KINDS
from microscale.integrations.hf.graph import Decoder
from microscale.invented import INVENTED
from microscale.machine import Machine, detect
from microscale.models import resolve
from microscale.plan import Outline, outline, plan, plan_shape
from test_plan import SMALL, big_machine, config_of, gpt_oss_20b  # noqa: F401 (a fixture)

NO_CORE = refuse_device("cpu", False)
LINEAR = "a Linear in it is PyTorch's"
SPARSE = ("mixtral", "qwen3_moe")  # their experts are in a block format once somebody has requantised them


@pytest.mark.parametrize(("name", "device"), [("zen5", None), ("avx2-laptop", None), ("h200", "cpu")])
def test_a_generated_token_of_gpt_oss_is_all_the_cores(
    gpt_oss_20b: Outline,  # noqa: F811
    name: str,
    device: str | None,
) -> None:
    found = gpt_oss_20b.on(INVENTED[name], device=device)
    assert found.why_modules is None
    assert {p.token_backend for p in found.placed} == {"cpu"}
    assert {p.layer.name for p in found.placed if p.backend == HOST} == {"embedding", "attention sinks"}
    experts, *others = found.placed
    assert experts.token is experts.choice.backend is not CORE  # type: ignore[union-attr]
    assert all(p.token is CORE for p in others)


@pytest.mark.parametrize(
    ("machine", "device", "backend", "why"),
    [
        (INVENTED["plain-x86"], None, None, LINEAR),
        (INVENTED["mac"], "cpu", None, LINEAR),
        (INVENTED["mac"], None, None, None),  # on its GPU: there is no chain to be missed
        (INVENTED["zen5"], None, "emulation", LINEAR),
        (big_machine(), None, None, NO_CORE),
    ],
)
def test_why_a_generated_token_is_its_modules(
    gpt_oss_20b: Outline,  # noqa: F811
    machine: Machine,
    device: str | None,
    backend: str | None,
    why: str | None,
) -> None:
    found = gpt_oss_20b.on(machine, device=device, backend=backend)
    assert found.why_modules == why
    assert not any(p.chained for p in found.placed)
    assert all(p.token_backend == p.backend for p in found.placed)


def test_a_bare_layer_generates_nothing() -> None:
    found = plan_shape("linear", "mxfp4", 64, 64, INVENTED["zen5"])
    assert (found.why_modules, found.placed[0].chained) == (None, False)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gpt_oss", *SPARSE)])
def test_a_plan_knows_the_architectures_that_the_core_knows(tmp_path: Path, kind: str) -> None:
    found = plan(config_of(tmp_path / kind, model_type=kind, **SMALL), INVENTED["zen5"])
    assert found.why_modules is None
    assert {p.token_backend for p in found.placed} == {"cpu"}
    assert {p.layer.name for p in found.placed if p.backend == HOST} == {"embedding", "norms etc."}


@pytest.mark.parametrize(
    ("layer", "backend", "act", "why"),
    [
        ("its experts", "cpu", "a16", None),
        ("its router", HOST, "a16", "its router is PyTorch's"),
        ("its experts", "emulation", "a16", "its experts by emulation, not by the core"),
        ("its experts", None, "a16", "its experts by no backend, not by the core"),
        ("a linear in it", "cpu", "mxfp8_e4m3", "activations are quantised to mxfp8_e4m3"),
    ],
)
def test_layers_of_the_chain(layer: str, backend: str | None, act: str, why: str | None) -> None:
    assert token_rules.refuse_layer(layer, backend, act) == why


def small_gpt_oss() -> dict[str, Any]:
    config = json.loads((resolve("gpt-oss-20b") / "config.json").read_text())
    kinds = ["sliding_attention"] * int(SMALL["num_hidden_layers"])
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": kinds}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return {**config, **SMALL, **sizes, **ids}


def cases() -> Iterator[Any]:
    """(config, what `load` and a plan are given, what both say where there is a core of AVX2 or more)."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    no_chain = "is not an architecture that the core has a chain for"
    for kind in KINDS:
        if kind != "gpt_oss":
            why = "its experts are not in a block format" if kind in SPARSE else None
            yield pytest.param({"model_type": kind, **SMALL}, {}, why, id=kind)
    llama = {"model_type": "llama", **SMALL}
    for name, changes, why in (
        ("activation", {"hidden_act": "relu"}, "its activation is relu"),
        ("rotary", {"rope_parameters": rope}, "its rotary embedding is dynamic, which changes on the way"),
        (
            "chunks",
            {"attention_chunk_size": 8},
            "it has layers of chunked_attention, whose cache a captured step does not know",
        ),
        ("relative", {"model_type": "internlm3"}, None),  # transformers makes it a LlamaForCausalLM
        ("stranger", {"model_type": "stablelm"}, f"StableLmForCausalLM {no_chain}"),
    ):
        yield pytest.param(llama | changes, {}, why, id=name)
    yield pytest.param(llama, {"backend": "emulation"}, LINEAR, id="forced")
    yield pytest.param(small_gpt_oss(), {}, None, id="gpt_oss")
    stored = "activations are quantised to mxfp8_e4m3"
    yield pytest.param(small_gpt_oss(), {"act": "a8"}, stored, id="gpt_oss a8")
    yield pytest.param(small_gpt_oss(), {"backend": "emulation"}, LINEAR, id="gpt_oss forced")


@pytest.mark.parametrize(("config", "options", "why"), list(cases()))
def test_a_plan_says_what_a_decoder_says(
    tmp_path: Path, config: dict[str, Any], options: dict[str, str], why: str | None
) -> None:
    path = config_of(tmp_path / "model", **config)
    agree(path, options, why)


def test_they_agree_where_linears_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROSCALE_DENSE", "off")
    agree(config_of(tmp_path / "model", **small_gpt_oss()), {}, LINEAR)


def agree(path: Path, options: dict[str, str], why: str | None) -> None:
    machine = detect()
    act, backend = options.get("act", "a16"), options.get("backend")
    found = outline(path, act=act).on(machine, device="cpu", backend=backend)
    decoder = Decoder(microscale.load(path, device="cpu", load_format="dummy", **options))
    decoder.generate(torch.randint(1, 100, (1, 4)), 3)
    assert (found.why_modules is None, found.why_modules) == (decoder.fused, decoder.why)
    if machine.core and machine.level not in ("plain", "neon"):
        assert found.why_modules == why
        assert {p.token_backend for p in found.placed} == {"cpu"} or why is not None
