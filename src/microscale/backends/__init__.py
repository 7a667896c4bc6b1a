"""The ordered table of backends. Adding one is a line here and a file beside this one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, cast

from microscale.backends import arithmetic
from microscale.backends.adapters.aiter_rules import refuse as refuse_aiter
from microscale.backends.adapters.flashinfer_rules import refuse as refuse_flashinfer
from microscale.backends.adapters.humming_rules import refuse as refuse_humming
from microscale.backends.adapters.torch_scaled_rules import accumulation as accumulation_torch_scaled
from microscale.backends.adapters.torch_scaled_rules import refuse as refuse_torch_scaled
from microscale.backends.adapters.xpu_kernels_rules import refuse as refuse_xpu_kernels
from microscale.backends.adapters.xpu_kernels_rules import yields as yields_xpu_kernels
from microscale.backends.contract import Contract
from microscale.backends.cpu_rules import refuse as refuse_cpu
from microscale.backends.measured import beside_humming
from microscale.backends.triton_rules import accumulation as accumulation_triton
from microscale.backends.triton_rules import refuse as refuse_triton
from microscale.backends.triton_rules import yields as yields_triton
from microscale.backends.triton_rules import yields_with_triton
from microscale.formats import Format
from microscale.oracle import Backend, Problem
from microscale.quant import QuantTensor

ENTRY_POINTS = "microscale.backends"


def _refuse_nothing(problem: Problem) -> str | None:
    return None


# Native first, emulation last: the order is the only priority. Adapters to other packages stand behind our own
# kernels: `measured.py` has both in one run on an NVIDIA H200, and how many tokens will come is not known when a layer
# is placed. Elsewhere nothing was measured. Among adapters, the one that needs no further package comes first, then
# those whose products take quantised activations as they are, then the one that widens them to bf16.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cpu",
        "microscale.backends.cpu",
        refuse_cpu,
        "the C++ core: weights decoded in registers, summed in float32, with the widest instructions that the CPU has",
        proven="x86 CPUs",
        arithmetic=arithmetic.cpu,
    ),
    Backend(
        "triton",
        "microscale.backends.triton",
        refuse_triton,
        "weights decoded in registers or, beside quantised activations, multiplied as codes; routing on the device",
        proven="NVIDIA H200",
        accumulation=accumulation_triton,
        arithmetic=arithmetic.triton,
        compared=beside_humming,
        yields=yields_triton,
    ),
    Backend(
        "torch_scaled",
        "microscale.backends.adapters.torch_scaled",
        refuse_torch_scaled,
        "torch's scaled_mm: both operands stay quantised, multiplied by the vendor's library; experts one by one",
        proven="NVIDIA H200",
        accumulation=accumulation_torch_scaled,
        arithmetic=arithmetic.torch_scaled,
        waits=True,
    ),
    Backend(
        "xpu_kernels",
        "microscale.backends.adapters.xpu_kernels",
        refuse_xpu_kernels,
        "vllm-xpu-kernels: oneDNN's products of quantised activations; experts' weights decoded to bf16 in registers",
        arithmetic=arithmetic.xpu_kernels,
        yields=yields_xpu_kernels,
        waits=True,
    ),
    Backend(
        "flashinfer",
        "microscale.backends.adapters.flashinfer",
        refuse_flashinfer,
        "flashinfer-python: products of quantised activations on Blackwell; MXFP4 experts with MXFP8 rows in one call",
        arithmetic=arithmetic.flashinfer,
        waits=True,
    ),
    Backend(
        "aiter",
        "microscale.backends.adapters.aiter",
        refuse_aiter,
        "amd-aiter: its Triton products of MXFP4 or block FP8 with each other; experts one by one",
        arithmetic=arithmetic.aiter,
        waits=True,
    ),
    Backend(
        "humming",
        "microscale.backends.adapters.humming",
        refuse_humming,
        "humming-kernels: weights decoded in registers, activations multiplied in bf16, in batch-invariant kernels",
        arithmetic=arithmetic.humming,
        proven="NVIDIA H200",
        yields=yields_with_triton,
        waits=True,
    ),
    Backend(
        "emulation",
        "microscale.backends.emulation",
        _refuse_nothing,
        "dequantise a tile, multiply in float32; only the experts that are routed to",
        proven="x86 CPUs, NVIDIA H200",
        arithmetic=arithmetic.emulation,
        waits=True,
    ),
)


@cache
def table() -> tuple[Backend, ...]:
    """Our backends and those that installed packages add.

    A package adds one with an entry point in the group "microscale.backends" that names a `Backend`. It takes its
    place in front of the one it names in `before`. One that cannot be loaded stays in the table and refuses with
    the reason, so that it never disappears silently.
    """
    return merge(BACKENDS, [_load(point) for point in entry_points(group=ENTRY_POINTS)])


def merge(ours: Sequence[Backend], added: Sequence[Backend]) -> tuple[Backend, ...]:
    """Put each added backend in front of the one it names; unknown names mean in front of the last."""
    merged = list(ours)
    for backend in added:
        names = [b.name for b in merged]
        place = names.index(backend.before) if backend.before in names else len(merged) - 1
        merged.insert(place, backend)
    return tuple(merged)


def _load(point: object) -> Backend:
    name = getattr(point, "name", "?")
    try:
        backend = point.load()  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001 (anything a stranger's module raises becomes its refusal)
        return _unusable(name, f"its package cannot be loaded: {type(error).__name__}: {error}")
    if not isinstance(backend, Backend):
        return _unusable(name, f"its entry point gives a {type(backend).__name__}, not a Backend")
    return backend


def _unusable(name: str, why: str) -> Backend:
    return Backend(name, "", lambda problem: why, "not usable")


def load(backend: Backend) -> Contract:
    """The module of a chosen backend; imported here and nowhere else."""
    # Looked up first, and in no cache of functools: torch.compile sees through this, not through an import. A module
    # that another thread is importing is among these, too, and half empty.
    found = sys.modules.get(backend.module)
    if found is None or backend.module not in _complete:
        found = importlib.import_module(backend.module)
        _complete.add(backend.module)
    return cast(Contract, found)


def pack(backend: Contract, w: QuantTensor, act: Format | None) -> Any:
    """Weights in a backend's layout, for activations that stay as they are (None) or are stored in a format."""
    given = getattr(backend, "pack_for", None)
    return backend.pack(w) if given is None else given(w, act)


_complete: set[str] = set()  # modules whose import has come to its end
