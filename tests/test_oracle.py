"""The oracle on invented machines: which backend, and the sentence for each refused one. No hardware involved."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from microscale.activations import GPT_OSS, Activation
from microscale.backends import BACKENDS, _load, load, measured, merge, table
from microscale.backends.triton_rules import yields
from microscale.errors import NoBackendError
from microscale.formats import FORMATS
from microscale.invented import INVENTED
from microscale.machine import CORE, PACKAGES, READ, SHORT, Machine
from microscale.oracle import Backend, Choice, Problem, choose

MOE = Problem(
    "moe", "mxfp4", 2880, 2880, intermediate=2880, experts=32, top_k=4, activation=GPT_OSS, bias=True
)
LINEAR = Problem("linear", "fp8_block128", 5120, 2880 // 128 * 128)
LINEAR_A8 = replace(LINEAR, act="fp8_group128")


def backend(name: str, why: str | None = None, before: str = "emulation") -> Backend:
    return Backend(name, f"nowhere.{name}", lambda problem: why, f"the {name} way", before=before)


GPUS = tuple(name for name, m in INVENTED.items() if m.device in ("cuda", "rocm", "xpu"))


@pytest.mark.parametrize("machine", INVENTED.values(), ids=lambda m: m.name)
def test_a16_mxfp4_experts_run_everywhere(machine: Machine) -> None:
    choice = choose(MOE.on(machine), BACKENDS)
    if machine.name in GPUS:
        assert choice.backend.name == "triton"
        why = f"the C++ core runs on the CPU, not on {machine.device}"
        assert dict(choice.refused)["cpu"] == why
    elif machine.device == "cpu":
        assert choice.backend.name == "cpu"
    else:
        assert choice.backend.name == "emulation"
        assert f"CUDA, ROCm and XPU, not for {machine.device}" in dict(choice.refused)["triton"]


@pytest.mark.parametrize("machine", INVENTED.values(), ids=lambda m: m.name)
def test_quantised_activations_run_everywhere(machine: Machine) -> None:
    choice = choose(LINEAR_A8.on(machine), BACKENDS)
    codes = machine.name in GPUS and machine.gpus[0].arch in ("sm_89", "sm_90", "sm_100", "sm_120", "gfx950")
    usual = "triton" if codes else "emulation"
    torchs = machine.name in ("h100", "h200", "arc-b580")
    usual = "cpu" if machine.device == "cpu" else usual
    assert choice.backend.name == ("torch_scaled" if torchs else usual)
    if torchs and codes:  # which yields, but runs what torch does not take, and where it is forced
        assert "times as long" in dict(choice.refused)["triton"]
        assert "triton" not in choice.skipped
        assert choose(replace(LINEAR_A8, k=2880).on(machine), BACKENDS).backend.name == "triton"
        assert choose(LINEAR_A8.on(machine), BACKENDS, "triton").backend.name == "triton"
        failed = [("torch_scaled", "it failed")]
        assert choose(LINEAR_A8.on(machine), BACKENDS, failed=failed).backend.name == "triton"
    if machine.device == "cpu":
        for act in ("mxfp8_e4m3", "nvfp4", "fp8_group128"):
            assert choose(replace(MOE, act=act).on(machine), BACKENDS).backend.name == "cpu"
    if machine.name in GPUS and not codes:
        why = dict(choice.refused)["triton"]
        assert why.startswith(("products of FP8 codes need ", "Triton widens FP8 codes on XPU"))


@pytest.mark.parametrize("machine", INVENTED.values(), ids=lambda m: m.name)
def test_activations_in_mx_formats_are_codes_where_units_take_them(machine: Machine) -> None:
    """Else they are widened; where units would take codes, other packages are asked first."""
    if machine.name not in GPUS:
        return
    arch = machine.gpus[0].arch
    units = arch in ("sm_100", "sm_120", "gfx950")
    for problem in (LINEAR_A8, MOE):
        for weight, act in (("mxfp8_e5m2", "mxfp8_e4m3"), ("mxfp4", "mxfp8_e4m3"), ("mxfp4", "mxfp6_e2m3")):
            choice = choose(replace(problem, weight=weight, act=act).on(machine), BACKENDS)
            if not units and machine.device != "xpu":
                assert choice.backend.name == "triton"
                assert choice.arithmetic.startswith("decoded: ")
            elif units and act == "mxfp8_e4m3" and (arch, weight) != ("sm_120", "mxfp4"):
                assert choice.backend.name == "triton"
                assert choice.arithmetic.startswith("native: block-scaled matrix units")
            else:
                assert choice.backend.name == "triton"
                assert choice.arithmetic.startswith("decoded: ")
                words = f"it widens activations in {act} to bf16: "
                assert words in str(yields(replace(problem, weight=weight, act=act).on(machine)))


def test_block_scaled_products_that_never_ran_yield_to_installed_packages() -> None:
    for name, word, package in (
        ("b200", "mxfp4", "torch_scaled"),
        ("mi355x", "mxfp4", "aiter"),
        ("rtx5090", "nvfp4", "torch_scaled"),
    ):
        problem = Problem("linear", word, 4096, 4096, act=word)
        machine = INVENTED[name].with_packages([SHORT["aiter"]])
        choice = choose(problem.on(machine), BACKENDS)
        assert choice.backend.name == package
        assert "have never run on one" in dict(choice.refused)["triton"]
        assert choose(problem.on(machine), BACKENDS, "triton").backend.name == "triton"


def test_packages_that_widen_activations_do_not_come_before_triton_because_it_widens_them() -> None:
    """Only those come that multiply codes; where Triton is not there, all are asked as ever."""
    for name, word, problem in (
        ("b200", "humming", Problem("linear", "mxfp4", 4096, 4096, act="mxfp6_e2m3")),
        ("rtx5090", "humming", Problem("linear", "mxfp4", 4096, 4096, act="mxfp8_e4m3")),
        ("arc-b580", "xpu_kernels", replace(MOE, act="mxfp8_e4m3")),
    ):
        machine = INVENTED[name].with_packages([SHORT[word]])
        choice = choose(problem.on(machine), BACKENDS)
        assert choice.backend.name == "triton"
        assert dict(choice.refused)[word] == f"it widens activations in {problem.act} to bf16"
        bare = replace(machine, packages=((SHORT[word], READ[SHORT[word]]),))
        assert choose(problem.on(bare), BACKENDS).backend.name == word
    codes = replace(MOE, bias=False, weight="mxfp4", act="mxfp8_e4m3", activation=Activation("silu"))
    machine = INVENTED["rtx5090"].with_packages([SHORT["flashinfer"], SHORT["humming"]])
    choice = choose(codes.on(machine), BACKENDS)
    assert choice.backend.name == "flashinfer"
    assert dict(choice.refused)["triton"].startswith(
        "it widens activations in mxfp8_e4m3 to bf16: on sm_120 "
    )


PLAIN_MOE = replace(MOE, bias=False, activation=Activation("silu"))
MXFP4 = Problem("linear", "mxfp4", 4096, 4096)
NVFP4 = Problem("linear", "nvfp4", 4096, 4096, act="nvfp4")
BLOCK = Problem("linear", "fp8_block128", 7168, 2048, act="fp8_group128")


@pytest.mark.parametrize(
    "name, packages, problem, expected",
    [
        ("a100", (), replace(MXFP4, act="mxfp8_e4m3"), "triton"),
        ("a100", ("humming",), replace(MXFP4, act="mxfp8_e4m3"), "triton"),
        ("h200", (), BLOCK, "torch_scaled"),
        ("h200", ("flashinfer",), NVFP4, "emulation"),
        ("h200", ("humming",), replace(PLAIN_MOE, act="mxfp8_e4m3"), "triton"),
        ("h200", ("humming",), replace(MOE, act="mxfp8_e4m3"), "triton"),
        ("b200", ("humming",), replace(PLAIN_MOE, act="mxfp8_e4m3"), "humming"),
        ("b200", (), NVFP4, "torch_scaled"),
        ("b200", (), BLOCK, "triton"),
        ("b200", ("flashinfer", "humming"), replace(PLAIN_MOE, act="mxfp8_e4m3"), "flashinfer"),
        ("b200", ("flashinfer",), replace(MOE, act="mxfp8_e4m3"), "triton"),
        ("mi300x", ("aiter",), BLOCK, "emulation"),
        ("mi355x", (), replace(MXFP4, act="mxfp4"), "triton"),
        ("rtx5090", (), replace(MXFP4, act="mxfp4"), "triton"),
        ("rtx5090", (), replace(MXFP4, act="mxfp8_e4m3"), "triton"),
        ("mi355x", ("aiter",), replace(MXFP4, act="mxfp4"), "aiter"),
        ("mi355x", ("aiter",), BLOCK, "triton"),
        ("arc-b580", (), replace(MXFP4, act="mxfp4"), "triton"),
        ("arc-b580", ("xpu_kernels",), replace(MXFP4, act="mxfp4"), "xpu_kernels"),
        ("arc-b580", ("xpu_kernels",), replace(MOE, act="mxfp8_e4m3"), "triton"),
        ("arc-b580", ("xpu_kernels",), BLOCK, "torch_scaled"),
    ],
)
def test_what_installed_packages_are_good_for(
    name: str, packages: tuple[str, ...], problem: Problem, expected: str
) -> None:
    machine = INVENTED[name].with_packages(SHORT[p] for p in packages)
    choice = choose(problem.on(machine), BACKENDS)
    assert choice.backend.name == expected, choice.explain()


# What checkpoints of these kinds ask for: Qwen3-30B-A3B in ModelOpt's NVFP4 (W4A4), DeepSeek-V3's block FP8 (W8A8 in
# groups of 128), and MXFP8 linears.
QWEN = replace(PLAIN_MOE, weight="nvfp4", n=2048, k=2048, intermediate=768, experts=128, top_k=8, act="nvfp4")
DEEPSEEK = replace(
    PLAIN_MOE,
    weight="fp8_block128",
    n=7168,
    k=7168,
    intermediate=2048,
    experts=256,
    top_k=8,
    act="fp8_group128",
)
MXFP8 = Problem("linear", "mxfp8_e4m3", 4096, 4096, act="mxfp8_e4m3")


@pytest.mark.parametrize(
    "name, problem, expected, arithmetic",
    [
        ("zen5", MOE, "cpu", "decoded: weights become bf16 in registers, and AVX-512-BF16"),
        ("avx2-laptop", MOE, "cpu", "decoded: weights become float32"),
        ("sapphire-rapids", MOE, "cpu", "decoded: weights become bf16 in registers, and AMX tiles"),
        ("sapphire-rapids", replace(MOE, dtype="fp16"), "cpu", "decoded: weights become float32"),
        ("zen5", QWEN, "cpu", "decoded: weights become bf16 in registers, and AVX-512-BF16"),
        ("sapphire-rapids", QWEN, "cpu", "decoded: weights become bf16 in registers, and AMX tiles"),
        ("sapphire-rapids", DEEPSEEK, "cpu", "decoded: weights become float32"),
        ("mac", MOE, "emulation", "emulated: "),
        ("h200", MOE, "triton", "decoded: weights become bf16 in registers, and the bf16 matrix unit"),
        ("h200", replace(MOE, dtype="fp16"), "triton", "decoded: weights become bf16 in registers"),
        ("b200", replace(MOE, dtype="fp16"), "triton", "decoded: weights become fp16 in registers"),
        ("t4", MOE, "triton", "decoded: weights become numbers in registers; no matrix unit"),
        ("rx7900xtx", MOE, "triton", "decoded: weights become bf16 in registers, and the bf16 matrix unit"),
        ("h200", QWEN, "emulation", "emulated: "),
        ("a100", QWEN, "emulation", "emulated: "),
        ("b200", QWEN, "torch_scaled", "native: FP4 tensor cores"),
        ("rtx5090", QWEN, "torch_scaled", "native: FP4 tensor cores"),
        ("mi355x", QWEN, "emulation", "emulated: "),
        ("arc-b580", QWEN, "torch_scaled", "native where the GPU has a unit for the format"),
        ("h200", DEEPSEEK, "triton", "native: FP8 matrix units"),
        ("b200", DEEPSEEK, "triton", "native: FP8 matrix units"),
        ("mi300x", DEEPSEEK, "emulation", "emulated: "),
        ("b200", MXFP8, "torch_scaled", "native: FP8 tensor cores"),
        ("h200", MXFP8, "triton", "decoded: weights become bf16"),
        ("a100", replace(MXFP8, dtype="fp32"), "triton", "decoded: weights become bf16"),
    ],
)
def test_what_is_multiplied_is_said(name: str, problem: Problem, expected: str, arithmetic: str) -> None:
    choice = choose(problem.on(INVENTED[name]), BACKENDS)
    assert choice.backend.name == expected, choice.explain()
    assert choice.arithmetic.startswith(arithmetic)


def test_hopper_with_another_triton_says_which_kernels_run() -> None:
    machine = replace(INVENTED["h200"], packages=(("triton", "3.10.0"),))
    said = choose(MOE.on(machine), BACKENDS).arithmetic
    assert said.endswith(
        "by the kernels for every GPU: those for Hopper need Triton 3.6.x to 3.9.x, and 3.10.0 is installed"
    )


@pytest.mark.parametrize("machine", INVENTED.values(), ids=lambda m: m.name)
def test_a_missing_package_is_the_reason_only_where_it_would_help(machine: Machine) -> None:
    """Nobody shall install a package because of a sentence, and then read another one."""
    bare = replace(machine, packages=())
    problems = [replace(p, weight=w) for p in (MOE, PLAIN_MOE, MXFP4) for w in FORMATS]
    problems += [QWEN, DEEPSEEK, MXFP8, NVFP4, BLOCK]
    problems += [replace(p, act=act) for p in problems for act in ("mxfp8_e4m3", "mxfp4", "nvfp4")]
    for problem in problems:
        for b in BACKENDS:
            why = b.refuse(problem.on(bare))
            if why is not None and why.startswith("the package "):
                package = why.split()[2]
                assert b.refuse(problem.on(bare.with_packages([package]))) is None, (b.name, str(problem))


def test_gfx942_is_refused_because_of_its_fp8() -> None:
    machine = INVENTED["mi300x"].with_packages(PACKAGES)
    assert "E4M3FNUZ" in dict(choose(BLOCK.on(machine), BACKENDS).refused)["aiter"]


@pytest.mark.parametrize("machine", INVENTED.values(), ids=lambda m: m.name)
def test_an_installed_package_changes_nothing_for_16_bit_activations(machine: Machine) -> None:
    everything = machine.with_packages(name for name in PACKAGES if name != "triton")
    for weight in FORMATS:
        for problem in (replace(MOE, weight=weight), replace(MXFP4, weight=weight)):
            for device in {machine.device, "cpu"}:
                alone, among = (choose(problem.on(m, device), BACKENDS) for m in (machine, everything))
                assert alone.backend == among.backend
                assert alone.numerics == among.numerics


def test_a_choice_says_how_it_computes() -> None:
    h200 = INVENTED["h200"]
    assert choose(MOE.on(h200), BACKENDS).numerics == "activations stay bf16; products are summed in float32"
    numerics = choose(BLOCK.on(h200), BACKENDS).numerics
    assert numerics.startswith(
        "activations are quantised to fp8_group128; products are summed by FP8 tensor cores"
    )
    assert "13 bits below the largest addend" in numerics


def test_assumed_packages_do_not_replace_installed_ones() -> None:
    old = replace(INVENTED["h200"], packages=(("humming-kernels", "0.1.2"),))
    machine = old.with_packages(["humming-kernels", "amd-aiter"])
    assert dict(machine.packages) == {"humming-kernels": "0.1.2", "amd-aiter": READ["amd-aiter"]}
    assert machine.assumed == {"amd-aiter"}


@pytest.mark.parametrize("machine", INVENTED.values(), ids=lambda m: m.name)
def test_every_machine_has_a_cpu_that_the_core_runs_on(machine: Machine) -> None:
    assert choose(MOE.on(machine, "cpu"), BACKENDS).backend.name == "cpu"
    bare = choose(MOE.on(replace(machine, core=""), "cpu"), BACKENDS)
    assert bare.backend.name == "emulation"
    assert "not in this installation" in dict(bare.refused)["cpu"]


def test_first_that_does_not_refuse_and_every_reason_before_it() -> None:
    backends = (backend("a", "too old"), backend("b", "too new"), backend("c"), backend("d"))
    choice = choose(LINEAR, backends)
    assert choice == Choice(LINEAR, backends[2], (("a", "too old"), ("b", "too new")), ("d",))
    assert choice.explain() == "+ c: the c way\n- a: too old\n- b: too new"


def test_all_refuse() -> None:
    with pytest.raises(NoBackendError) as error:
        choose(MOE, (backend("a", "too old"), backend("b", "too new")))
    assert error.value.refused == (("a", "too old"), ("b", "too new"))
    assert "E=32 T=4 H=2880 I=2880" in str(error.value)
    assert "- a: too old\n- b: too new" in str(error.value)


def test_force_allows_one_only_and_it_may_still_refuse() -> None:
    backends = (backend("a"), backend("b", "no tiles"), backend("c"))
    assert choose(LINEAR, backends, force="c").backend.name == "c"
    assert dict(choose(LINEAR, backends, force="c").refused)["a"] == "not the forced one (c)"
    with pytest.raises(NoBackendError, match="b: no tiles"):
        choose(LINEAR, backends, force="b")
    with pytest.raises(NoBackendError, match="no backend has this name; known: a, b, c"):
        choose(LINEAR, backends, force="z")


def test_a_failed_backend_is_not_asked_again() -> None:
    asked = []

    def refuse(problem: Problem) -> str | None:
        asked.append(problem)
        return None

    backends = (Backend("a", "m", refuse, "how"), backend("b"))
    choice = choose(LINEAR, backends, failed=[("a", "the canary failed")])
    assert choice.backend.name == "b"
    assert choice.refused == (("a", "the canary failed"),)
    assert not asked


def test_problem_on_a_machine_takes_its_facts() -> None:
    h200 = INVENTED["h200"]
    assert (MOE.on(h200).device, MOE.on(h200).arch) == ("cuda", "sm_90")
    assert MOE.on(h200).packages == {"triton", CORE}
    assert (MOE.on(h200, "cpu").device, MOE.on(h200, "cpu").arch) == ("cpu", "amx")
    levels = {name: m.level for name, m in INVENTED.items() if not m.gpus}
    assert levels == {
        "avx2-laptop": "avx2",
        "zen5": "avx512_bf16",
        "sapphire-rapids": "amx",
        "sapphire-rapids-no-amx": "avx512_bf16",
        "plain-x86": "plain",
    }
    assert INVENTED["mac"].level == "neon"


def test_added_backends_go_where_they_say() -> None:
    ours = (backend("x"), backend("emulation"))
    names = [
        b.name for b in merge(ours, [backend("y"), backend("z", before="x"), backend("w", before="gone")])
    ]
    assert names == ["z", "x", "y", "w", "emulation"]


def test_an_entry_point_that_cannot_be_loaded_refuses_with_the_reason() -> None:
    broken = _load(EntryPoint("theirs", "no_such_module:backend", "microscale.backends"))
    why = broken.refuse(LINEAR)
    assert broken.name == "theirs"
    assert why is not None
    assert "ModuleNotFoundError: No module named 'no_such_module'" in why
    wrong = _load(EntryPoint("theirs", "math:pi", "microscale.backends"))
    assert "gives a float, not a Backend" in str(wrong.refuse(LINEAR))
    good = _load(EntryPoint("theirs", "microscale.backends:BACKENDS", "microscale.backends"))
    assert "gives a tuple" in str(good.refuse(LINEAR))


def test_table_ends_with_emulation_and_every_backend_says_how() -> None:
    names = [b.name for b in table()]
    assert names[-1] == "emulation"
    assert len(set(names)) == len(names)
    assert all(b.how for b in table())


def test_a_choice_says_how_it_compares_where_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = INVENTED["h200"]
    qwen = replace(MOE, n=2048, k=2048, intermediate=768, experts=128, top_k=8, activation=Activation("silu"))

    def said(problem: Problem, machine: Machine = h200) -> str | None:
        return choose(problem.on(machine), BACKENDS).compared

    ours = said(MOE)
    assert ours is not None
    assert ours.endswith("on an NVIDIA H200: humming took 1.33 to 2.18 times as long, for 1 to 8192 tokens")
    assert ours in choose(MOE.on(h200), BACKENDS).explain()
    monkeypatch.setitem(measured.HUMMING, (128, 8, 2048, 768), (1.75, 1.48, 1.58, 1.57, 1.12, 0.99, 1.03))
    behind = str(said(qwen))
    assert "humming took 1.03 to 1.75 times as long, but 0.99 times for 2048 tokens" in behind
    assert "but not in this shape: in others humming took 1.09 to 1.59 times as long" in str(said(MXFP4))
    assert said(replace(MXFP4, dtype="fp16")) is None
    assert said(replace(MXFP4, weight="nvfp4")) is None
    assert said(MOE, INVENTED["b200"]) is None
    assert said(MOE, INVENTED["zen5"]) is None


def test_a_backend_is_waited_for_while_another_thread_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a module has no functions yet, and the layer would go to the next backend, for good."""
    (tmp_path / "slow_backend.py").write_text("import time\ntime.sleep(0.5)\ndef pack(w): return w\n")
    monkeypatch.syspath_prepend(tmp_path)
    slow = Backend("slow", "slow_backend", lambda problem: None, "slowly")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: hasattr(load(slow), "pack"), range(4)))
    assert found == [True] * 4
