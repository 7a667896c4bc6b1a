"""Plans against bytes and choices worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from microscale import CheckpointError, FormatError, MicroscaleError
from microscale.activations import GPT_OSS, Activation
from microscale.backends import BACKENDS
from microscale.backends.dense_rules import HOST
from microscale.backends.triton_rules import refuse_steps
from microscale.checkpoints import open_checkpoint
from microscale.formats import FORMATS
from microscale.integrations.hf.architectures import KINDS
from microscale.invented import INVENTED
from microscale.machine import CORE, Machine
from microscale.models import resolve
from microscale.oracle import Backend
from microscale.plan import KvCache, Outline, outline, outline_shape, plan, plan_shape, stored_bytes
from microscale.quant import quantize

# gpt-oss-20b: hidden and intermediate size, layers, experts of which 4 per token, vocabulary.
H, INNER, L, E, TOP_K, V = 2880, 2880, 24, 32, 4, 201088
HEADS, KV_HEADS, HEAD_DIM = 64, 8, 64

EXPERT_WEIGHTS = L * E * (2 * INNER * H + H * INNER) * 17 // 32  # 4 bits each and 8 for every 32: 4.25 bits
EXPERT_BIASES = L * E * (2 * INNER + H) * 2
ATTENTION = L * 2 * ((HEADS + 2 * KV_HEADS) * HEAD_DIM * (H + 1) + HEADS * HEAD_DIM * H + H)
ROUTER = L * 2 * (E * H + E)
NORMS, SINKS = 2 * (2 * L + 1) * H, 2 * L * HEADS


def big_machine(**changes: object) -> Machine:
    return Machine("big", "CPU", frozenset({"avx2", "fma"}), False, 8, 1 << 40, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def gpt_oss_20b() -> Outline:
    return outline("gpt-oss-20b")


def test_gpt_oss_20b_is_stored_in_the_bytes_that_its_shapes_say(gpt_oss_20b: Outline) -> None:
    stored = {c.name: c.stored for c in gpt_oss_20b.classes}
    assert stored == {
        "experts": EXPERT_WEIGHTS + EXPERT_BIASES,
        "embedding": V * H * 2,
        "attention q/k/v/o": ATTENTION,
        "router": ROUTER,
        "lm_head": V * H * 2,
        "norms": NORMS,
        "attention sinks": SINKS,
    }
    assert EXPERT_WEIGHTS == 10_152_345_600  # 24 * 32 * (5760 * 2880 + 2880 * 2880) * 4.25 / 8
    assert gpt_oss_20b.stored == sum(stored.values())


def test_gpt_oss_20b_reads_four_of_its_experts_and_one_row_of_its_embedding(gpt_oss_20b: Outline) -> None:
    read = {c.name: c.read for c in gpt_oss_20b.classes}
    assert read["experts"] == (EXPERT_WEIGHTS + EXPERT_BIASES) * TOP_K // E
    assert read["embedding"] == H * 2
    assert read["attention q/k/v/o"] == ATTENTION
    assert read["lm_head"] == V * H * 2
    assert gpt_oss_20b.read == pytest.approx(3.70e9, rel=0.005)  # peers-and-users.md, 0.10


def test_gpt_oss_20b_counts_modules_and_formats(gpt_oss_20b: Outline) -> None:
    found = {c.name: (c.count, c.format, c.declared) for c in gpt_oss_20b.classes}
    assert found["experts"] == (L, "mxfp4", "a16")
    assert found["attention q/k/v/o"] == (4 * L, "bf16", None)
    assert found["router"] == (L, "bf16", None)
    assert found["lm_head"] == (1, "bf16", None)


@pytest.mark.parametrize(
    "name, device, wish, expected",
    [
        ("zen5", None, None, "cpu"),
        ("h200", None, None, HOST),
        ("h200", "cpu", None, "cpu"),
        ("plain-x86", None, None, HOST),
        ("zen5", None, "emulation", HOST),
    ],
)
def test_gpt_oss_norms_are_where_its_routers_are(
    gpt_oss_20b: Outline, name: str, device: str | None, wish: str | None, expected: str
) -> None:
    """As `integrations.hf.linears.place_linears` does; what the sinks are added to is transformers' attention."""
    found = {p.layer.name: p for p in gpt_oss_20b.on(INVENTED[name], device=device, backend=wish).placed}
    assert found["norms"].backend == found["router"].backend == expected
    assert found["attention sinks"].backend == HOST
    assert found["norms"].problem is None


def test_gpt_oss_20b_asks_the_oracle_what_loading_asks(gpt_oss_20b: Outline) -> None:
    problem = gpt_oss_20b.on(INVENTED["h200"]).placed[0].problem
    assert problem is not None
    assert (problem.op, problem.weight, problem.act, problem.dtype) == ("moe", "mxfp4", "a16", "bf16")
    assert (problem.n, problem.k, problem.intermediate, problem.experts, problem.top_k) == (
        H,
        H,
        INNER,
        E,
        TOP_K,
    )
    assert (problem.activation, problem.bias) == (GPT_OSS, True)
    assert (problem.device, problem.arch, problem.packages) == ("cuda", "sm_90", {"triton", CORE})


def test_half_of_the_cache_stops_growing_at_the_window(gpt_oss_20b: Outline) -> None:
    layer = 2 * KV_HEADS * HEAD_DIM * 2
    assert gpt_oss_20b.kv == KvCache(L * layer, L // 2 * layer, 128)


def test_layers_cuts_the_model() -> None:
    cut = outline("gpt-oss-20b", layers=2)
    assert cut.classes[0].stored == (EXPERT_WEIGHTS + EXPERT_BIASES) // 12
    with pytest.raises(CheckpointError, match="1 to 24"):
        outline("gpt-oss-20b", layers=25)


def test_a_machine_is_an_argument_and_so_is_its_device(gpt_oss_20b: Outline) -> None:
    machine = INVENTED["b200"]
    on_gpu, on_cpu = gpt_oss_20b.on(machine), gpt_oss_20b.on(machine, device="cpu")
    assert (on_gpu.device, on_gpu.memory) == ("cuda", machine.gpus[0].memory)
    assert (on_cpu.device, on_cpu.memory) == ("cpu", machine.memory)
    assert on_cpu.placed[0].problem is not None
    assert on_cpu.placed[0].problem.arch == "amx"
    with pytest.raises(MicroscaleError, match="has no device 'rocm'; it has cpu, cuda"):
        gpt_oss_20b.on(machine, device="rocm")


def test_refusals_are_kept_where_one_is_chosen_and_where_none_is(gpt_oss_20b: Outline) -> None:
    never = Backend("never", "", lambda p: "it never runs", "nothing")
    always = Backend("always", "", lambda p: None, "everything")
    chosen = gpt_oss_20b.on(big_machine(), backends=(never, always)).placed[0]
    assert chosen.backend == "always"
    assert chosen.refused == (("never", "it never runs"),)
    none = gpt_oss_20b.on(big_machine(), backends=(never,))
    assert none.placed[0].backend is None
    assert none.placed[0].refused == (("never", "it never runs"),)
    assert not none.runs
    assert none.placed[1].backend == "transformers"


def test_a_forced_backend_is_the_only_one(gpt_oss_20b: Outline) -> None:
    placed = gpt_oss_20b.on(INVENTED["zen5"], backend="emulation").placed[0]
    assert placed.backend == "emulation"
    assert all(why == "not the forced one (emulation)" for _, why in placed.refused)


def test_act_reaches_the_problem() -> None:
    placed = plan("gpt-oss-20b", INVENTED["h200"], act="a8", layers=1).placed[0]
    assert placed.problem is not None
    assert placed.problem.act == "mxfp8_e4m3"
    with pytest.raises(FormatError, match="unknown format 'a5'"):
        plan("gpt-oss-20b", INVENTED["h200"], act="a5", layers=1)


def config_of(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16", **config}))
    return path


def test_a_tied_lm_head_is_stored_once_and_read_whole(tmp_path: Path) -> None:
    config = json.loads((resolve("gpt-oss-20b") / "config.json").read_text())
    config |= {"tie_word_embeddings": True, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    found = {c.name: c for c in outline(config_of(tmp_path / "tied", **config)).classes}
    assert found["embedding"].stored == V * H * 2
    assert found["lm_head (tied)"].stored == 0
    assert found["lm_head (tied)"].read == V * H * 2


def test_a_dense_model_is_planned_and_every_layer_slides_or_none(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    dense = outline(config_of(tmp_path / "llama", model_type="llama", **sizes, **heads))
    assert not any(c.quantised for c in dense.classes)
    chosen = {p.layer.name: p.backend for p in dense.on(INVENTED["zen5"]).placed}
    linears = ("attention q/k/v/o", "mlp gate/up/down", "lm_head")
    assert chosen == {"embedding": HOST, "norms etc.": HOST, **dict.fromkeys(linears, "cpu")}
    found = {c.name: c.stored for c in dense.classes}
    assert found["mlp gate/up/down"] == 3 * 3 * 64 * 96 * 2
    assert found["attention q/k/v/o"] == 3 * (2 * 64 * 64 + 2 * 64 * 32) * 2
    assert dense.kv == KvCache(3 * 2 * 2 * 16 * 2, 3 * 2 * 2 * 16 * 2, 0)


def test_dense_experts_are_read_by_their_share(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    found = {c.name: c for c in outline(config_of(tmp_path / "qwen", **config)).classes}
    assert found["experts"].stored == 2 * 8 * 3 * 32 * 64 * 2
    assert found["experts"].read == found["experts"].stored // 4
    assert found["router"].count == 2


def test_an_unknown_quant_method_is_refused_and_the_known_ones_named(tmp_path: Path) -> None:
    """In the words that it is refused with where there are weights, too."""
    path = config_of(tmp_path / "odd", model_type="llama", quantization_config={"quant_method": "magic"})
    with pytest.raises(CheckpointError) as caught:
        outline(path)
    told = str(caught.value)
    assert told.startswith(f"{path / 'config.json'}: unknown quant_method 'magic'; known: mxfp4, or none")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == told


def test_layers_are_cut_where_the_config_counts_them(tmp_path: Path) -> None:
    path = config_of(tmp_path / "gpt2", model_type="gpt2", n_layer=4)
    with pytest.raises(CheckpointError, match=r"config.json: layers cannot be cut: .*integer, found None"):
        outline(path, layers=2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n, k", [(1, 128), (5, 256), (130, 288)])
def test_stored_bytes_are_those_of_a_quantised_tensor(name: str, n: int, k: int) -> None:
    assert stored_bytes(name, (n, k)) == quantize(torch.zeros(n, k), name).nbytes
    assert stored_bytes(name, (3, n, k)) == quantize(torch.zeros(3, n, k), name).nbytes


def test_a_bare_linear() -> None:
    placed = plan_shape("linear", "fp8_block128", 4096, 2048, INVENTED["h200"], act="a8")
    layer = placed.outline.classes[0]
    assert layer.stored == layer.read == 4096 * 2048 + 32 * 16 * 4
    assert placed.outline.model == "linear fp8_block128 fp8_group128 bf16 N=4096 K=2048"


def test_a_bare_moe() -> None:
    sizes = {"experts": 8, "top_k": 2, "intermediate": 96}
    layer = outline_shape("moe", "mxfp4", 64, 64, **sizes, bias=True).classes[0]  # type: ignore[arg-type]
    one = (192 * 64 + 64 * 96) * 17 // 32 + (192 + 64) * 2
    assert (layer.stored, layer.read) == (8 * one, 2 * one)
    assert layer.problem is not None
    assert layer.problem.activation == Activation("silu")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("conv", "mxfp4", 8, 32, {}), "unknown op 'conv'; known: linear, moe"),
        (("linear", "mxfp5", 8, 32, {}), "unknown format 'mxfp5'"),
        (("linear", "mxfp4", 0, 32, {}), "linear needs n from 1 to 2147483648, not 0"),
        (("moe", "mxfp4", 32, 32, {}), "moe needs experts from 1"),
        (("moe", "mxfp4", 32, 64, {"experts": 4, "top_k": 2, "intermediate": 32}), "n and k must be equal"),
        (
            ("moe", "mxfp4", 32, 32, {"experts": 4, "top_k": 5, "intermediate": 32}),
            "top_k 5 is more than the 4",
        ),
    ],
)
def test_a_shape_that_is_none_is_refused(arguments: tuple, message: str) -> None:
    op, fmt, n, k, sizes = arguments
    with pytest.raises(FormatError, match=message):
        outline_shape(op, fmt, n, k, **sizes)


def test_every_invented_machine_runs_every_format() -> None:
    for machine in INVENTED.values():
        for name in FORMATS:
            assert plan_shape("linear", name, 256, 256, machine).runs


def test_a_generated_token_of_gpt_oss_is_tritons_where_its_chain_is(gpt_oss_20b: Outline) -> None:
    chained = {"attention q/k/v/o", "router", "lm_head", "norms", "attention sinks"}
    found = gpt_oss_20b.on(INVENTED["h200"])
    assert found.why_modules is None
    assert {p.layer.name for p in found.placed if p.chained} == chained
    assert {p.backend for p in found.placed if p.chained} == {HOST}
    assert {p.token_backend for p in found.placed if p.chained} == {"triton"}
    assert all(p.token_backend == p.backend for p in found.placed if not p.chained)


@pytest.mark.parametrize(
    ("machine", "device", "why"),
    [
        (INVENTED["t4"], None, "this GPU is sm_75"),
        (INVENTED["mi300x"], None, "the model is on rocm"),
        (replace(INVENTED["h200"], packages=()), None, "the package triton is not installed"),
        (INVENTED["mac"], None, None),
    ],
)
def test_why_a_generated_token_is_its_modules(
    gpt_oss_20b: Outline, machine: Machine, device: str | None, why: str | None
) -> None:
    """Where there are CUDA graphs; elsewhere there is no chain of Triton's to be missed."""
    found = gpt_oss_20b.on(machine, device=device)
    assert not any(p.chained for p in found.placed)
    said = why and f"a token's kernels are Triton's, for CUDA from sm_80 on, and {why}"
    assert found.why_modules == said


def test_a_graph_holds_only_experts_that_do_not_wait(gpt_oss_20b: Outline) -> None:
    for device in ("cuda", "cpu"):
        forced = gpt_oss_20b.on(INVENTED["h200"], device=device, backend="emulation").why_no_graph
        assert (forced is not None) == (device == "cuda")
    assert gpt_oss_20b.on(INVENTED["h200"]).why_no_graph is None
    assert {b.name for b in BACKENDS if not b.waits} == {"cpu", "triton"}


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt_oss"])
def test_a_plan_knows_the_architectures_that_the_chain_knows(tmp_path: Path, kind: str) -> None:
    found = plan(config_of(tmp_path / kind, model_type=kind, **SMALL), INVENTED["h200"])
    assert found.why_modules is None
    # What a step computes of unquantised experts is transformers', from its products on.
    assert {p.layer.name.split()[0] for p in found.placed if not p.chained} <= {"experts", "embedding"}


def test_a_plan_says_what_the_chain_says_of_others(tmp_path: Path) -> None:
    path = config_of(tmp_path / "stablelm", model_type="stablelm", **SMALL)
    found = plan(path, INVENTED["h200"])
    assert found.why_modules == f"stablelm is none of {', '.join(KINDS)}"
    assert not any(p.chained for p in found.placed)


def test_rows_that_are_no_whole_lines_stay_with_pytorch(tmp_path: Path) -> None:
    path = config_of(tmp_path / "odd", model_type="llama", **{**SMALL, "intermediate_size": 36})
    found = {p.layer.name: p for p in plan(path, INVENTED["h200"]).placed}
    assert found["mlp gate/up"].chained
    assert not found["mlp down"].chained


def test_where_the_chain_is_has_one_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `load` and a `Decoder` ask of a GPU that is here, and a plan of one that is not."""
    from microscale.integrations.hf import attention

    cuda = torch.device("cuda")
    for capability in ((7, 5), (8, 0), (9, 0), (10, 0)):
        for packages in ({}, {"triton": "3.6.0"}):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
            monkeypatch.setattr(attention, "detect", lambda p=packages: SimpleNamespace(packages=p))
            arch = "sm_{}{}".format(*capability)
            taken = attention.triton_steps.__wrapped__(cuda)
            assert taken == (refuse_steps("cuda", arch, packages) is None)
            assert taken == (capability >= (8, 0) and bool(packages))


def test_every_architecture_of_transformers_is_planned_or_refused_in_a_sentence(tmp_path: Path) -> None:
    """By a config of a few sizes, of which many are not an architecture's own words for them."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    on_gpu, on_cpu = set(), set()
    for kind in sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}):
        path = config_of(tmp_path / kind, model_type=kind, **{**SMALL, "num_hidden_layers": 2})
        try:
            what = outline(path)
        except MicroscaleError:  # anything else is nobody's sentence
            continue
        for machine, chained in (("h200", on_gpu), ("zen5", on_cpu)):
            found = what.on(INVENTED[machine])
            assert found.runs
            if found.why_modules is None:
                chained.add(kind)
    assert on_gpu == set(KINDS)
    # The core knows an architecture by its class, whatever the config is called; experts of 16 bits it does not know.
    dense = {f"{kind}ForCausalLM" for kind in ("Llama", "Mistral", "Qwen2", "Qwen3")}
    classes = MODEL_FOR_CAUSAL_LM_MAPPING.items()
    assert on_cpu == {config.model_type for config, model in classes if model.__name__ in dense}
    assert on_cpu >= {"llama", "mistral", "qwen2", "qwen3"}


def test_heads_that_differ_from_layer_to_layer_are_counted_each(tmp_path: Path) -> None:
    """Gemma 4: heads of layers with a window, and of those without."""
    sizes = {**SMALL, "num_hidden_layers": 3, "global_head_dim": 32, "sliding_window": 8}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    path = config_of(tmp_path / "gemma", model_type="gemma4_text", layer_types=kinds, **sizes)
    sliding, full = (2 * 2 * width * 2 for width in (16, 32))  # keys and values of 2 heads, 2 bytes a number
    assert outline(path).kv == KvCache(2 * sliding + full, full, 8)
