"""That the triton backend's kernels compile for GPUs that are not here: every format, linears and experts, to machine
code. What becomes of it on such a GPU only such a GPU can tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from triton_ahead import KERNELS, POINTERS, PRODUCTS, STEP, TARGETS, Job, Made, run

from ahead import begun
from microscale.backends.triton_rules import BLOCKS, refuse, refuse_blocks
from microscale.formats import FORMATS
from microscale.invented import INVENTED
from microscale.oracle import Problem


def everything() -> list[Job]:
    """Every kernel for every target; those of a step in every dtype; products of every format in bfloat16, and two
    more linears of each.

    One of those has the largest tile, where memory could be short, and one another dtype. Where E8M0 scales go, into
    the tile or on the sums, takes turns.
    """
    jobs = [Job(t, kernel) for t in TARGETS for kernel in KERNELS if kernel not in (*PRODUCTS, *STEP)]
    jobs += [Job(t, kernel, dtype=dtype) for t in TARGETS for kernel in STEP for dtype in POINTERS]
    for t, target in enumerate(TARGETS):
        for f, (name, fmt) in enumerate(FORMATS.items()):
            powers = fmt.scale == "e8m0"
            turn = powers and (t + f) % 2 == 0
            other = (torch.float16, 40) if (t + f // 2) % 2 else (torch.float32, 512)
            jobs += [Job(target, kernel, name, in_tile=turn) for kernel in PRODUCTS]
            jobs.append(Job(target, "linear", name, tokens=300, in_tile=powers and not turn, bias=False))
            jobs.append(Job(target, "linear", name, *other, in_tile=turn))
        if TARGETS[target].codes:
            jobs += [
                Job(target, k, "fp8_block128", tokens=m, codes=True) for k in PRODUCTS for m in (16, 300)
            ]
        jobs += [
            Job(target, k, weight, tokens=m, act=act)
            for weight, act in PAIRS
            if refuse_blocks(target, weight, act) is None
            for k in PRODUCTS
            for m in (16, 300)
        ]
    return jobs


PAIRS = [*((weight, act) for weight in BLOCKS for act in BLOCKS), ("nvfp4", "nvfp4")]
JOBS = everything()


def ahead(item: pytest.Function) -> Iterator[tuple[Callable[[Job], Made], Job]]:
    """What a test waits for."""
    if "made" in item.fixturenames and find_spec("triton") is not None:
        yield run, item.callspec.params["job"]


@pytest.fixture(scope="module")
def made() -> Callable[[Job], Made]:
    """The result of a job."""
    pytest.importorskip("triton", reason=str(refuse(Problem("linear", "mxfp4", 1, 1, device="rocm"))))
    return lambda job: begun(run, job).result()


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_it_compiles_to_machine_code(made: Callable[[Job], Made], job: Job) -> None:
    found, gpu = made(job), TARGETS[job.target]
    assert not found.error, found.error
    assert found.code > 0
    assert found.shared <= gpu.shared
    assert found.columns <= gpu.columns
    assert "trap;" not in found.text  # what Triton puts in place of a kernel that needs more than there is
    # Not only code, but that of the GPU's matrix unit, where it has one.
    if job.format and job.dtype == torch.bfloat16:
        product = gpu.codes if job.codes else gpu.product
        if job.act:
            same = job.format == job.act
            product = gpu.blocks[{"mxfp4": 0, "nvfp4": 2}.get(job.act, 1) if same else 1]
        assert re.search(product, found.text), f"no {product} in its {gpu.text}"


def test_every_target_has_every_format_and_op() -> None:
    found = {(j.target, j.format, j.kernel) for j in JOBS if j.dtype == torch.bfloat16 and j.format}
    assert found == {(t, f, k) for t in TARGETS for f in FORMATS for k in PRODUCTS}
    assert {(j.target, j.kernel) for j in JOBS} == {(t, k) for t in TARGETS for k in KERNELS}
    for name, fmt in FORMATS.items():
        kinds = {(j.dtype, j.in_tile) for j in JOBS if j.format == name}
        assert {dtype for dtype, _ in kinds} == {torch.bfloat16, torch.float16, torch.float32}
        assert {in_tile for _, in_tile in kinds} == ({True, False} if fmt.scale == "e8m0" else {False})


def test_block_scaled_products_are_taken_where_they_become_instructions() -> None:
    for target, gpu in TARGETS.items():
        taken = {pair for pair in PAIRS if refuse_blocks(target, *pair) is None}
        wanted = {pair for pair in PAIRS if gpu.blocks[2 if "nvfp4" in pair else 0]}
        if target == "sm_120":
            wanted -= {pair for pair in PAIRS if pair.count("mxfp4") == 1}
        assert taken == wanted


@pytest.mark.parametrize("name", [n for n, m in INVENTED.items() if m.device in ("cuda", "rocm")])
def test_every_invented_gpu_is_one_that_is_compiled_for(name: str) -> None:
    (gpu,) = INVENTED[name].gpus
    assert gpu.arch in TARGETS
