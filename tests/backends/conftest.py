"""The C++ core at each of its levels; Triton, where it is installed; CUDA C++ for Hopper, run on the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from microscale import env
from microscale.backends.triton_rules import refuse
from microscale.errors import SettingError
from microscale.formats import FORMATS, Element
from microscale.machine import detect
from microscale.oracle import Problem

HERE = Path(__file__).parent


@pytest.fixture
def cpu() -> Any:
    """The backend's module; where the core is absent, a skip that says why."""
    if not detect().core:
        pytest.skip(f"the C++ core is not in this installation: {detect().core_missing}")
    return import_module("microscale.backends.cpu")


@pytest.fixture(params=env.CPU_LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cpu: Any) -> str:
    """Each level, in force for the test; one that this machine lacks is a skip with the core's own sentence."""
    monkeypatch.setenv("MICROSCALE_CPU_LEVEL", request.param)
    try:
        cpu.cpu_core.level()
    except SettingError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Any]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def layout() -> Any:
    pytest.importorskip("triton", reason=str(refuse(Problem("linear", "mxfp4", 1, 1, device="rocm"))))
    from microscale.backends.triton import layout

    return layout


@pytest.fixture(scope="module")
def wide() -> Any:
    pytest.importorskip("triton", reason="the package triton is not installed")
    return import_module("microscale.backends.triton.hopper_wide")


@pytest.fixture(scope="module")
def source(wide: Any) -> Any:
    return import_module("microscale.backends.triton.hopper_text")


def decoder(element: Element, scale: str) -> str:
    """`decode_group` by the tables of `placement`, instead of by instructions."""
    placement = import_module("microscale.backends.triton.placement")
    count, integer = placement.words(element.name), element.exponent_bits == 0
    values, offset = [v * 64 if integer else v for v in element.values], 128 * integer
    table = ", ".join(f"{v!r}f" if abs(v) < 1e30 else "0.0f" for v in map(float, values))
    rows = ", ".join(f"{{{p}, {h}, {w}, {m}, {s}}}" for p, h, w, m, s in placement.taken(element.name))
    joined = ", w0 + (w1 << 2)" if placement.sums(element.name) else ""
    words = ", ".join(f"w{i}" for i in range(count))
    args = ", ".join(f"u32 w{i}" for i in range(count))
    if scale == "e4m3":
        field = "(q ? s << 8 | s >> 24 : s) >> (odd ? 20 : 4) & 0xFF"
        factor = f"static_cast<double>(wide_float(0x7000 | ({field}) << 4)) * std::ldexp(1.0, -126)"
    else:
        missing = -133 if integer else element.bias - 127
        factor = f"std::ldexp(static_cast<double>(wide_float(s >> 16 * odd & 0xFFFF)), {missing})"
    return f"""
static const struct {{ int pair, half, word; u32 mask; int shift; }} kPlaces[] = {{{rows}}};
static const float kValues[] = {{{table}}};
static void decode_group(u32 (&o)[8], {args}, u32 s) {{
  const u32 words[] = {{{words}{joined}}};
  u32 codes[8][2] = {{}};
  for (const auto &p : kPlaces)
    codes[p.pair][p.half] ^= (p.shift >= 0 ? words[p.word] >> p.shift : words[p.word] << -p.shift) & p.mask;
  for (int pair = 0; pair < 8; pair++) {{
    const int odd = pair % 2, q = pair / 4;
    (void)q;
    const double factor = {factor};
    const double low = kValues[codes[pair][0] ^ {offset}] * factor, high = kValues[codes[pair][1] ^ {offset}] * factor;
    o[pair] = packed(static_cast<float>(low), static_cast<float>(high));
  }}
}}
"""


@pytest.fixture(scope="module")
def launch(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """In the place of `hopper_wide`'s own: up to four programs, on the CPU."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    built: dict[Any, Any] = {}
    folder = tmp_path_factory.mktemp("wide")

    def build(spec: Any) -> Any:
        element = next(f.element for f in FORMATS.values() if f.element.name == spec.element)
        products = "".join(
            f"template <> struct Product<{n}> {{\n"
            f"template <int SUMS> static void add(float (&d)[SUMS], const u32 *w, u64 x, int more) "
            f"{{ multiply_add<{n}>(d, w, x, more); }}\n"
            f"static void codes(float (&d)[MOST / 2], u64 x, u64 w) {{ multiply_codes<{n}>(d, x, w); }} }};\n"
            for n in spec.sizes
        )
        text = folder / f"{len(built)}.cc"
        text.write_text(
            source.constants(spec)
            + f'#include "{HERE / "hopper_emulated.h"}"\n'
            + decoder(element, spec.scale)
            + "template <int N> struct Product;\n"
            + products
            + source.kernel(spec)
            + f'\n#include "{HERE / "hopper_emulated_launch.h"}"\n'
        )
        library = text.with_suffix(".so")
        options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", str(library)]
        subprocess.run([compiler, *options, str(text)], check=True, capture_output=True, timeout=300)
        return ctypes.CDLL(str(library))

    def run(
        spec: Any, device: torch.device, units: int, given: ctypes.Structure, programs: int = 0, seed: int = 0
    ) -> None:
        if spec not in built:
            built[spec] = build(spec)
        groups = spec.users if spec.file == "hopper_rings.cu" else spec.threads // 128
        if not programs:
            programs, seed = (int(torch.randint(1, most, ())) for most in (5, 1 << 30))
        wrong = built[spec].emulate(ctypes.byref(given), programs, spec.threads, groups, seed)
        faults = (
            "waits for ever",
            "reads before the kernel ahead has ended",
            "copies what is not seen yet",
            "brings tokens that are not there",
        )
        assert wrong == 0, f"a thread {faults[wrong - 1]}"

    return run


@pytest.fixture
def emulated(wide: Any, launch: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(wide, "launch", launch)
    return wide
