"""Hopper's own kernels of the triton backend, compiled without a GPU: every cut of the tables, and that weights stay in
registers.

MICROSCALE_TEST_EVERY_CUT=1 compiles each cut in every combination of options, which takes minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_ahead import TARGETS, Made, compiled, made, suitable_bytes

from ahead import all_of
from microscale.formats import FORMATS

ACTIVATIONS = (("swiglu_oai", True, True, True), ("silu", True, False, False), ("silu", False, False, True))


def in_blocks(cut: Any, tokens: int) -> str:
    """The type of a descriptor for bulk copies."""
    from triton.experimental.gluon import language as gl

    block = [tokens, 64 * cut.copied]
    return f"tensordesc<bf16{block},{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}>"


def given(
    packed: Any,
    cut: Any,
    activation: tuple[str, bool, bool, bool],
    parts: int,
    direct: bool,
    bias: str | None,
) -> dict[str, Any]:
    """What the three kernels are called with, as the host code does."""
    kind, gated, interleaved, _ = activation
    whole = half = rest = "*bf16"
    if cut.bulk:
        cuts = import_module("microscale.backends.triton.cuts")
        main, more = cuts.split(cut.block_m)
        whole, rest = in_blocks(cut, main), in_blocks(cut, more or main)
        tail = cuts.tail_of(cut.block_m)
        half = in_blocks(replace(cut, block_m=tail), tail) if cut.tail else whole
    ids = "*i64" if direct else "*i32"
    return cut.constants(packed) | {
        "codes": "*i32",
        "scales": "*i32",
        "ratios": "*fp32" if packed.ratios is not None else None,
        **dict.fromkeys(("tile_experts", "tile_starts", "ends", "order"), ids),
        **dict.fromkeys(("M", "N", "K", "WIDTH", "TILES", "CHUNKS", "STEPS", "top_k"), "i32"),
        **dict.fromkeys(("experts", "known"), "i32"),
        **dict.fromkeys(("alpha", "beta", "limit"), "fp32"),
        **dict.fromkeys(("y", "shares"), "*bf16"),
        "whole": whole,
        "half": half,
        "rest": rest,
        "bias": bias,
        "HAS_BIAS": bias is not None,
        "topk_weights": "*fp32",
        "expert_map": "*i64" if direct else None,
        "HAS_MAP": direct,
        "DIRECT": direct,
        "TAIL": cut.tail and not direct,
        "PARTS": parts,
        "ALL": cut.block_m > 8,
        "FEW": packed.chunks if cut.few else 0,
        "ROOM": cut.room(packed.shape[-1]) if cut.few else 0,
        "row_scale": "*fp32" if packed.row_scale is not None else None,
        "GROUP": 8,
        "KIND": kind,
        "GATED": gated,
        "INTERLEAVED": interleaved,
        "HAS_LIMIT": interleaved,
        "WEIGHT_ON_INPUT": False,
        "PDL": True,
        "LOGITS": 0,
        "TOP_K": 4,
        "SLOTS": 4,
        "EARLY": 16,
    }


def packed_weights(name: str, k: int) -> Any:
    return import_module("microscale.backends.triton.fragments").pack(suitable_bytes(name, (2, 128, k)))


def modules() -> list[Any]:
    return [import_module(f"microscale.backends.triton.{n}") for n in ("hopper", "hopper_moe", "cuts")]


def for_hopper(kernel: Any, arguments: dict[str, Any], cut: Any) -> Any:
    """The tokens that a kernel reads come in bulk if its cut says so, h of `_first_kernel` being what it writes."""
    options = {"num_warps": cut.warps} | {k: arguments[k] for k in ("maxnreg",) if k in arguments}
    read = "h" if kernel.fn.__name__ == "_second_kernel" else "x"
    arguments = {"x": "*bf16", "h": "*bf16"} | arguments
    for suffix, what in (("", "whole"), ("_half", "half"), ("_rest", "rest")):
        arguments[read + suffix] = arguments[what]
    return compiled(kernel, "sm_90", arguments, options, ("K", "N", "WIDTH"))


@pytest.mark.parametrize(
    "name, activation, block_m, overlap, parts, direct, tail, bulk",
    [
        ("mxfp4", ACTIVATIONS[0], 8, False, 1, True, False, 0),
        ("mxfp4", ACTIVATIONS[0], 64, True, 1, False, True, 4),
        ("nvfp4", ACTIVATIONS[1], 128, True, 1, False, True, 0),
        ("nvfp4", ACTIVATIONS[1], 64, True, 3, False, False, 0),
        ("nvfp4", ACTIVATIONS[2], 64, True, 1, False, True, 1),
        ("mxfp8_e5m2", ACTIVATIONS[2], 32, True, 1, False, True, 0),
        ("mxfp8_e4m3", ACTIVATIONS[1], 64, True, 1, False, True, 4),
        ("mxfp6_e3m2", ACTIVATIONS[0], 8, False, 1, True, False, 0),
        ("mxfp6_e2m3", ACTIVATIONS[0], 64, True, 1, False, True, 4),
        ("mxint8", ACTIVATIONS[1], 16, True, 2, False, False, 0),
        ("fp8_block128", ACTIVATIONS[0], 64, True, 1, False, True, 0),
        ("fp8_block128", ACTIVATIONS[1], 8, False, 1, True, False, 0),
        ("fp8_block128", ACTIVATIONS[0], 64, True, 1, False, True, 4),
        ("mxfp4", ACTIVATIONS[0], 96, True, 1, False, True, 4),
        ("nvfp4", ACTIVATIONS[1], 80, True, 1, False, True, 4),
        ("fp8_block128", ACTIVATIONS[2], 72, True, 1, False, True, 4),
    ],
)
def test_the_hopper_kernels_keep_weights_in_registers(
    layout: Any, name: str, activation: tuple[str, bool, bool, bool],
    block_m: int, overlap: bool, parts: int, direct: bool, tail: bool, bulk: int,
) -> None:  # fmt: skip
    hopper, experts, cuts = modules()
    cut = cuts.Cut(block_m, 2, 2 if parts == 1 else 1, 8, 3, overlap, tail, bulk)
    arguments = given(packed_weights(name, 160), cut, activation, parts, direct, "*bf16")
    for kernel in (hopper._linear_kernel, experts._first_kernel, experts._second_kernel):
        ptx = for_hopper(kernel, arguments, cut).asm["ptx"]
        products = re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (\S)", ptx)
        # A brace: the left operand is a list of registers.
        assert set(products) == {"{"}
        if overlap:  # one product waits for the one before it, so that two are under way
            pending = 2 * (2 if cuts.split(block_m)[1] else 1) if bulk else parts
            assert f"wgmma.wait_group.sync.aligned {pending};" in re.sub(r"\s+", " ", ptx)
        assert not serialized(ptx)
        # Tokens by bulk copies, and codes by loads of 16 bytes.
        assert ("cp.async.bulk.tensor" in ptx) == (bulk > 0)
        if bulk:
            assert "ld.global.v4.b32" in ptx
            assert "cp.async.cg" not in ptx


@pytest.mark.parametrize(
    "name, word, activation, k, direct, logits",
    [
        ("mxfp4", "m8t1c2w4s5fp3", ACTIVATIONS[0], 2880, True, 0),
        ("mxfp4", "m8t1c2w4s5fp3", ACTIVATIONS[0], 2880, True, 32),
        ("mxfp4", "m8t2c1w8s8f", ACTIVATIONS[1], 2048, True, 128),
        ("mxfp4", "m8t2c1w8s8f", ACTIVATIONS[1], 2048, False, 0),
        ("nvfp4", "m8t1c2w4s8f", ACTIVATIONS[2], 768, True, 0),
        ("mxfp6_e2m3", "m8t2c1w4s4f", ACTIVATIONS[0], 160, False, 0),
        ("mxfp8_e4m3", "m16t2c1w8s4f", ACTIVATIONS[1], 288, False, 0),
        ("mxint8", "m8t1c1w4s5f", ACTIVATIONS[0], 800, True, 0),
        ("mxfp4", "m8t1c2w4s8f", ACTIVATIONS[2], 14336, True, 0),
    ],
)
def test_the_loop_for_a_few_tokens_waits_for_nothing_but_the_matrix_unit(
    layout: Any,
    name: str,
    word: str,
    activation: tuple[str, bool, bool, bool],
    k: int,
    direct: bool,
    logits: int,
) -> None:
    """Codes go to registers 16 bytes at a time, some of them between products, and no warp waits for others there."""
    _, experts, cuts = modules()
    cut = cuts.Cut.parse(word)
    packed = packed_weights(name, k)
    arguments = given(packed, cut, activation, 1, direct, "*bf16")
    if logits:
        table = dict.fromkeys(("tile_experts", "tile_starts", "ends", "order"), "*bf16")
        arguments |= table | {"LOGITS": logits, "expert_map": None, "HAS_MAP": False}
    for kernel in (experts._first_kernel, experts._second_kernel):
        made = for_hopper(kernel, arguments, cut)
        ptx = made.asm["ptx"]
        assert set(re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, (\S)", ptx)) == {"{"}
        assert not serialized(ptx)
        assert made.metadata.shared <= max(cut.shared(packed.format, 1, k), 4096) <= cuts.HOPPER_SHARED
        first, last = (find("wgmma.mma_async") for find in (ptx.index, ptx.rindex))
        assert "bar.sync" not in ptx[first:last]
        turn = cut.chunks * cut.stages * 64
        if k > turn:  # whether loads stay where they are is up to ptxas, which heeds this
            assert "ld.global.v4.b32" in ptx[first:last]
            assert "bar.warp.sync" in ptx[first:last]


def serialized(ptx: str) -> str:
    """What ptxas says if it lets no two products be under way; that is all that tells of it, but for the time."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", source, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "\n".join(line for line in said.splitlines() if "serialized" in line)


def table_kernels() -> list[tuple[Any, Any, int, str]]:
    """(kernel, cut, parts of the activations, format): what the tables can select, formats of a group taking turns."""
    hopper, experts, cuts = modules()
    found = []
    for name, (linear, moe) in cuts.table().items():
        formats = [fmt for fmt in FORMATS.values() if cuts.group(fmt) == name]
        turn = cycle(formats)
        kernels = [(hopper._linear_kernel, usual(cut, tail=False)) for row in linear for cut in row.cuts]
        # Rings are `test_hopper_rings`', and what stands in for them is in other rows.
        for first, second in [pair for row in moe if not row.rings for pair in row.pairs]:
            kernels.append((experts._first_kernel, usual(first, tail=True)))
            kernels.append((experts._second_kernel, usual(second, tail=True)))
        for kernel, cut in dict.fromkeys(kernels):
            fmt = next(turn)
            found.append((kernel, cut.fitted(fmt, 1), 1, fmt.name))
        for kernel in (experts._first_kernel, experts._second_kernel, hopper._linear_kernel):
            for tokens, parts in product((8, 64), (2, 3)):
                fmt = next(turn)
                found.append((kernel, cuts._in_parts(tokens).fitted(fmt, parts), parts, fmt.name))
    return found


def usual(cut: Any, tail: bool) -> Any:
    """Gluon's own, or what runs where CUDA C++ cannot be compiled; that is `test_hopper_wide`'s."""
    return cut.usual(tail) if cut.wide else cut


def cut_jobs() -> list[tuple[int, str, tuple[str, bool, bool, bool], int, bool]]:
    """(number in `table_kernels`, format, activation, K, single token): each kernel once, the rest taking turns."""
    hopper, experts, cuts = modules()
    jobs = []
    for i, (kernel, cut, _, own) in enumerate(table_kernels()):
        # w2 and linear know of an activation only whether there is a bias.
        activations = ACTIVATIONS if kernel is experts._first_kernel else ACTIVATIONS[:2]
        # A single token has no more than 8 rows, and a linear no routes.
        direct = (False, True) if cut.block_m == 8 and kernel is not hopper._linear_kernel else (False,)
        options = list(product(activations, (192, 512), direct))
        names = [own]
        if os.environ.get("MICROSCALE_TEST_EVERY_CUT") == "1":
            names = [n for n, fmt in FORMATS.items() if cuts.group(fmt) == cuts.group(FORMATS[own])]
        else:
            options = [options[5 * i % len(options)]]
        jobs += [(i, name, *option) for name, option in product(names, options)]
    return jobs


def compile_cut(job: tuple[int, str, tuple[str, bool, bool, bool], int, bool]) -> Made:
    """One of `cut_jobs`, in a process of its own."""
    i, name, activation, k, single = job
    kernel, cut, parts, _ = table_kernels()[i]
    bias = "*bf16" if activation[3] else None
    arguments = given(packed_weights(name, k), cut, activation, parts, single, bias)
    result = made("sm_90", lambda: for_hopper(kernel, arguments, cut))
    slow = serialized(result.text) if result.text else ""
    return replace(result, error=slow) if slow else result


def ahead(item: pytest.Function) -> Iterator[tuple[Callable[[Any], Made], Any]]:
    """What a test waits for."""
    if item.function is test_every_cut_of_the_tables_compiles:
        for job in cut_jobs():
            yield compile_cut, job


def test_every_cut_of_the_tables_compiles(layout: Any) -> None:
    """By default each kernel once, with formats, activations, sizes and single tokens taking turns."""
    results = all_of(compile_cut, cut_jobs())
    assert len(results) >= len(table_kernels()) > 0
    failed = [
        (str(table_kernels()[job[0]]), job, result)
        for job, result in results.items()
        if result.error or not result.code or result.shared > TARGETS["sm_90"].shared
    ]
    assert not failed


def test_the_kernel_that_puts_tokens_in_order_compiles(layout: Any) -> None:
    ordering = import_module("microscale.backends.triton.ordering")
    given = {
        **dict.fromkeys(("ordered", "x"), "*bf16"),
        **dict.fromkeys(("order", "ends"), "*i32"),
        **dict.fromkeys(("top_k", "experts", "K"), "i32"),
    }
    made = compiled(
        ordering._in_order_kernel, "sm_90", given | {"PLACES": 8, "COLUMNS": 1024, "PDL": True}, {}, ("K",)
    )
    assert "ld.global.v4.b32" in made.asm["ptx"]


def test_what_does_not_compile_is_left_to_the_kernels_for_every_target(layout: Any) -> None:
    attempt = import_module("microscale.backends.triton.fallback").attempt
    tried = []

    def broken() -> torch.Tensor:
        tried.append(1)
        raise RuntimeError("PassManager::run failed")

    with pytest.warns(UserWarning, match="linear m8t1 .*PassManager::run failed"):
        assert attempt(broken, lambda: torch.ones(1), "linear", "m8t1") == 1
    assert attempt(broken, lambda: torch.ones(1), "linear", "m8t1") == 1
    assert len(tried) == 1

    def rejected() -> torch.Tensor:
        raise RuntimeError("error encountered during parsing")

    with pytest.warns(UserWarning, match="linear m8t3 .*during parsing"):
        assert attempt(rejected, lambda: torch.ones(1), "linear", "m8t3") == 1

    def unknown() -> torch.Tensor:
        raise import_module("microscale.backends.triton.nvrtc").CompileError("wide.cu: no such instruction")

    with pytest.warns(UserWarning, match="linear m8t4 .*no such instruction"):
        assert attempt(unknown, lambda: torch.ones(1), "linear", "m8t4") == 1

    def lost() -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        attempt(lost, lambda: torch.ones(1), "linear", "m8t2")
