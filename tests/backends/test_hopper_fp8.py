"""`hopper_fp8.cu` with no GPU: compiled for one, and run on the CPU by `hopper_emulated.h`."""

from __future__ import annotations

import ctypes
import math
import shutil
import struct
import subprocess
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_hopper_wide import compiles, portable, table_of, touches, touches_nothing
from torch import Tensor

from microscale.accumulation import HOPPER_FP8
from microscale.activations import GPT_OSS, Activation
from microscale.backends.adapters.operands import quantized_rows
from microscale.formats import FP8_GROUP128, Format
from microscale.quant import quantize
from microscale.tolerance import moe_budget

SILU = Activation("silu")


def rounded(x: Tensor, act: Format, columns: int) -> tuple[Tensor, Tensor]:
    """As `rounded.codes_of` makes them on a GPU."""
    rows, pad = quantized_rows(x, act), torch.nn.functional.pad
    scales = pad(rows.scales, (0, -rows.scales.shape[1] % columns), value=math.nan)
    return pad(rows.codes, (0, -x.shape[1] % 128)), scales


@pytest.fixture(scope="module")
def module() -> Any:
    pytest.importorskip("triton", reason="the package triton is not installed")
    return import_module("microscale.backends.triton.hopper_fp8")


@pytest.fixture
def fp8(module: Any, launch: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    # As `Box` of `hopper_emulated.h` has it, in numbers of 16 bits.
    monkeypatch.setattr(
        module, "box_map_of_rows",
        lambda codes: struct.pack("Qiii108x", codes.data_ptr(), codes.shape[0], codes.shape[1] // 2, 64),
    )  # fmt: skip
    monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(module.hopper_wide, "zeros", lambda count, _: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(
        module.hopper_wide.routing,
        "route",
        lambda ids, _map, experts, most, _pdl: table_of(ids, experts, most),
    )
    monkeypatch.setattr(module.rounded, "codes_of", rounded)
    monkeypatch.setattr(module.nvrtc, "refuse", lambda: None)
    return module


def of_experts(
    fp8: Any,
    ids: Tensor,
    experts: int,
    seed: int,
    columns: tuple[int, int],
    activation: Activation = SILU,
    biased: bool = True,
    strange: bool = False,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Shares [M, T, H], whose sums are checked against what is permitted. `columns`: of w13 and w2; `strange`: the
    second token has a NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layout = import_module("microscale.backends.triton.layout")
    (tokens, top_k), (hidden, inner) = ids.shape, columns
    w13 = quantize(random(experts, 2 * inner, hidden) / 8, "fp8_block128")
    w2 = quantize(random(experts, hidden, inner) / 8, "fp8_block128")
    x, share = random(tokens, hidden).bfloat16(), random(tokens, top_k).softmax(-1)
    if strange:
        x[1, -1] = math.nan
    biases = (random(*w13.shape[:2]).bfloat16(), random(*w2.shape[:2]).bfloat16().float())
    given = biases if biased else (None, None)
    packed = layout.pack(w13), layout.pack(w2)
    assert not fp8.refuse(x, *packed, activation, given, share, False)
    shares = fp8.experts(x, ids, share, *packed, given, activation, FP8_GROUP128, expert_map)
    local = ids if expert_map is None else torch.cat((expert_map, expert_map.new_full((1,), -1)))[ids]
    there = (local >= 0)[..., None]
    shares = torch.where(there, shares.view(tokens, top_k, hidden), 0)
    y = shares.float().sum(1).bfloat16()
    rest = {"b13": given[0], "b2": given[1], "expert_map": expert_map, "act": FP8_GROUP128}
    if strange:
        assert y[1].isnan().all()
        y, x = y[2:], x[2:]
        ids, share = ids[2:], share[2:]
    worst = moe_budget(x, ids, share, w13, w2, activation, accumulation=HOPPER_FP8, **rest).worst(y)
    assert worst <= 1, f"error is {worst:.3g} times the permitted one"
    return shares


@pytest.mark.parametrize(
    "activation",
    [SILU, Activation("swiglu_step", limit=1.0), Activation("swiglu_oai", interleaved=False)],
    ids=lambda a: a.kind,
)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_experts_are_within_the_permitted_error(
    fp8: Any, activation: Activation, biased: bool, seed: int
) -> None:
    """Columns that fill no block, rows that fill no unit; an expert with more tokens than a unit, one with none."""
    ids = (torch.randn(150, 2, generator=torch.Generator().manual_seed(seed)) > -1.2).long()
    ids[0] = -1
    of_experts(fp8, ids, 3, seed, (224, 256), activation, biased, strange=True)


@pytest.mark.parametrize("columns", [(1120, 128), (32, 1152)], ids=["w13", "w2"])
def test_numbers_of_steps_and_who_sorts_routes_do_not_matter(
    fp8: Any, seed: int, monkeypatch: pytest.MonkeyPatch, columns: tuple[int, int]
) -> None:
    """Nine steps, whose scales come four at a time, and one; in units of which each has another number of tokens."""
    ids = (torch.arange(80)[:, None] % 5).clamp(max=2)
    given = fp8, ids, 4, seed, columns
    listed = of_experts(*given)
    monkeypatch.setattr(fp8, "ROOMS", ())
    assert torch.equal(of_experts(*given), listed)
    monkeypatch.setattr(fp8, "_STAGES", 3)
    assert torch.equal(of_experts(*given), listed)


def test_experts_that_are_elsewhere_have_no_share(fp8: Any, seed: int) -> None:
    ids = torch.tensor([[0, 3], [2, 1], [3, 3], [-1, 0]])
    of_experts(fp8, ids, 2, seed, (64, 128), expert_map=torch.tensor([1, -1, -1, 0]))


def test_what_it_has_no_kernel_for(fp8: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = import_module("microscale.backends.triton.layout").pack

    def refuses(
        hidden: int = 64, inner: int = 128, x: Any = torch.bfloat16, activation: Activation = SILU,
        name: str = "fp8_block128", bias: Any = torch.bfloat16, share: Any = torch.float32, on_input: bool = False,
    ) -> bool:  # fmt: skip
        w13, w2 = (pack(quantize(torch.ones(2, *s), name)) for s in ((2 * inner, hidden), (hidden, inner)))
        biases = torch.zeros(2, 2 * inner, dtype=bias), None
        rest = torch.zeros(3, 1, dtype=share), on_input
        return bool(fp8.refuse(torch.zeros(3, hidden, dtype=x), w13, w2, activation, biases, *rest))

    assert not refuses()
    assert refuses(hidden=48)
    assert refuses(inner=192)
    assert refuses(x=torch.float16)
    assert refuses(activation=GPT_OSS)
    assert refuses(activation=Activation("gelu"))
    assert refuses(activation=Activation("silu", gated=False))
    assert refuses(name="mxfp8_e4m3")
    assert refuses(bias=torch.float16)
    assert refuses(share=torch.float16)
    assert refuses(on_input=True)
    monkeypatch.setattr(fp8.nvrtc, "refuse", lambda: "no compiler")
    assert refuses()


def specs(module: Any) -> list[Any]:
    """As `_spec` makes them: few and many routes, with and without what is optional."""
    ids, share = torch.zeros(8, 8, dtype=torch.long), torch.zeros(8, 8)
    w13 = SimpleNamespace(shape=(128, 1536, 2048))
    bias = torch.zeros(1).bfloat16(), torch.zeros(1)
    many = ids.expand(200, 8, 8).reshape(-1, 8)
    return [
        module._spec(w13, ids, share, (None, None), SILU, None),
        module._spec(w13, many, share.bfloat16(), bias, Activation("swiglu_step", limit=7.0), None),
        module._spec(w13, ids.int(), share, bias, SILU, ids[0]),
    ]


@pytest.mark.parametrize("case", range(3))
def test_it_compiles_and_no_product_waits_for_another(module: Any, source: Any, case: int) -> None:
    if module.nvrtc.refuse() is not None:
        pytest.skip(module.nvrtc.refuse())
    spec = specs(module)[case]
    assert bool(spec.routes) == (case != 1)
    static = compiles(module.nvrtc, source, spec)
    assert static <= spec.fixed
    assert spec.shared + static <= 227 << 10
    before, behind = portable(source.text(spec)).split("griddepcontrol.wait")
    touches_nothing(before)
    assert touches(behind)


def test_rows_of_boxes_are_in_the_order_of_results(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """What the driver is told, against the order in which the emulation has rows."""
    linears = import_module("microscale.backends.triton.hopper_linear")
    told: list[Any] = []
    driver = SimpleNamespace(cuTensorMapEncodeTiled=lambda *given: told.append(given) or 0)
    monkeypatch.setattr(linears, "_driver", lambda: driver)
    linears.box_map_of_rows(torch.zeros(96, 256, dtype=torch.uint8))
    _, _, rank, _, sizes, strides, box, *_ = told[0]
    assert (rank, list(sizes), list(box)) == (5, [128, 2, 4, 4, 3], [64, 2, 4, 4, 2])
    rows = [
        (i * strides[0] + t * strides[1] + j * strides[2] + g * strides[3]) // 256
        for g in range(box[4]) for j in range(box[3]) for t in range(box[2]) for i in range(box[1])
    ]  # fmt: skip
    assert rows == [
        32 * g + 8 * t + 2 * j + i for g in range(2) for j in range(4) for t in range(4) for i in range(2)
    ]


QUOTIENTS = """
extern "C" long differ(const float *v, const float *scale, int count) {
  long wrong = 0;
  for (int i = 0; i < count; i++) {
    const float q = v[i] / scale[i], r = quotient(v[i], divisor_of(scale[i]));
    wrong += !(q == r || (std::fabs(q) < 1e-4f && std::fabs(r) < 1e-4f));  // both are far below the least code
  }
  return wrong;
}
"""


def test_quotients_are_divisions(source: Any, tmp_path: Path, seed: int) -> None:
    """Of every scale's exponent, and numbers of its block of every size."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    text = source.part("hopper_fp8_divisor.h")
    file, library = tmp_path / "quotient.cc", tmp_path / "quotient.so"
    file.write_text("#include <cmath>\n#define DEVICE static inline\n" + text + QUOTIENTS)
    options = ["-O2", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(library), str(file)]
    subprocess.run([compiler, *options], check=True, timeout=120)
    generator = torch.Generator().manual_seed(seed)
    shape = (277, 2000)
    exponent = torch.arange(-149, 128)[:, None].double()
    most = (torch.exp2(exponent) * (1 + torch.rand(shape, generator=generator).double())).float()
    most = most.clamp(max=torch.finfo(torch.float32).max)
    scale = most / 448
    scale[scale == 0] = 1
    less = torch.exp2(-torch.randint(0, 20, shape, generator=generator).float())
    v = most * torch.rand(shape, generator=generator) * less
    v[:, ::7] = most[:, ::7]
    differ = ctypes.CDLL(str(library)).differ
    differ.restype = ctypes.c_long
    pointers = (ctypes.c_void_p(t.contiguous().data_ptr()) for t in (v, scale))
    assert differ(*pointers, v.numel()) == 0
