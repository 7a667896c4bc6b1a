"""Products of many tokens on Hopper in CUDA C++, `hopper_wide.cu`, for cuts that are `wide`.

Groups of warps of one program work without a barrier between them, and a program's number of tokens is fitted to what
an expert has: two things that Gluon cannot say. `nvrtc` compiles the text when it is first needed.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.triton import nvrtc, tiles
from microscale.backends.triton.cuts import Cut
from microscale.backends.triton.fragments import Fragments
from microscale.backends.triton.hopper_text import KINDS, MOST_OF_TWO, Spec, text
from microscale.backends.triton.routing import Table

_FLOATS = {torch.bfloat16: 1, torch.float32: 2}  # as `Spec.bias` says it
_GROUP = 8  # tiles of tokens that take turns with the rows, so that both are found in the cache


class Given(ctypes.Structure):
    """The kernel's argument, as the text has it."""

    _fields_ = [
        *[
            (n, ctypes.c_uint64)
            for n in (
                "y", "x", "codes", "scales", "ratios", "row_scale", "bias",
                "tile_experts", "tile_starts", "ends", "order", "weights",
            )
        ],
        *[
            (n, ctypes.c_int)
            for n in (
                "units", "blocks", "group", "tokens", "tokens_each",
                "rows", "width", "columns", "tiles", "chunks", "top_k",
            )
        ],
        *[(n, ctypes.c_float) for n in ("alpha", "beta", "limit")],
    ]  # fmt: skip


@cache
def _kernel(spec: Spec, device: int) -> nvrtc.Kernel:
    return nvrtc.kernel("hopper_wide.cu", text(spec), "wide", spec.shared, device)


def launch(spec: Spec, device: torch.device, units: int, given: Given) -> None:
    """On the current stream; `units`: of work, for as many programs at most as there are multiprocessors."""
    index = torch.cuda.current_device() if device.index is None else device.index
    _kernel(spec, index).launch(min(units, tiles.target(device).units), spec.threads, given, early=True)


def refuse(w: Fragments, activation: Activation | None, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether these weights, with biases and routing weights of these dtypes, are for Gluon's kernels instead."""
    return (
        w.shape[-2] % 8 != 0
        or any(dtype not in _FLOATS for dtype in dtypes)
        or (activation is not None and activation.kind not in KINDS)
        or nvrtc.refuse() is not None
    )


def taken(
    cuts: tuple[Cut, Cut],
    weights: tuple[Fragments, Fragments],
    activation: Activation,
    others: tuple[Tensor | None, ...],
    weight_on_input: bool,
) -> tuple[Cut, Cut]:
    """These cuts of w13 and w2, or Gluon's for as many tokens: both are wide, or none is.

    Args:
        others: routing weights and biases.
    """
    dtypes = tuple(t.dtype for t in others if t is not None)
    if (
        weight_on_input
        or cuts[0].wide != cuts[1].wide
        or (activation.apart and cuts[0].block_m > MOST_OF_TWO)
        or any(refuse(w, activation, dtypes) for w in weights)
    ):
        cuts = tuple(cut.usual(tail=True) if cut.wide else cut for cut in cuts)  # type: ignore[assignment]
    return cuts


def _spec(mode: str, w: Fragments, cut: Cut, **rest: object) -> Spec:
    return Spec(
        mode, w.format.element.name, w.format.scale, cut.block_m, cut.stages, cut.users, cut.tiles // cut.users,
        even=w.shape[-1] % 64 == 0, row_scale=w.row_scale is not None, **rest,  # type: ignore[arg-type]
    )  # fmt: skip


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _run(
    spec: Spec,
    w: Fragments,
    y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    blocks: int,
    of_tokens: int,
    **rest: float,
) -> Tensor:
    """`y`, of so many blocks of rows times tiles of tokens; `rest`: what else `Given` has."""
    given = Given(
        y=y.data_ptr(), x=x.data_ptr(), codes=w.codes.data_ptr(), scales=w.scales.data_ptr(),
        ratios=_address(w.ratios),
        row_scale=_address(w.row_scale), bias=_address(bias), units=blocks * of_tokens, blocks=blocks,
        rows=w.shape[-2], width=y.shape[-1], columns=w.shape[-1], tiles=w.tiles, chunks=w.chunks, **rest,
    )  # fmt: skip
    launch(spec, x.device, blocks * of_tokens, given)
    return y


def _kind(t: Tensor | None) -> int:
    return 0 if t is None else _FLOATS[t.dtype]


def linear(x: Tensor, w: Fragments, bias: Tensor | None, cut: Cut) -> Tensor:
    """[M, K] bfloat16, contiguous and at a multiple of 16 bytes -> [M, N]."""
    m, n = x.shape[0], w.shape[-2]
    each = cut.each(m, w.tiles)
    return _run(
        _spec("linear", w, cut, bias=_kind(bias)), w, torch.empty(m, n, dtype=x.dtype, device=x.device), x, bias,
        -(-w.tiles // cut.tiles), -(-m // each), group=_GROUP, tokens=m, tokens_each=each,
    )  # fmt: skip


def _routes(table: Table) -> dict[str, int]:
    return {
        name: getattr(table, name).data_ptr() for name in ("tile_experts", "tile_starts", "ends", "order")
    }


def first(
    x: Tensor,
    weights: Tensor,
    w: Fragments,
    bias: Tensor | None,
    activation: Activation,
    table: Table,
    cut: Cut,
) -> Tensor:
    """As `hopper_moe.first`, with the tokens in their own order; the table's tiles have the cut's `block_m` tokens."""
    gated, apart = activation.gated, activation.apart
    inner = w.shape[1] // 2 if gated else w.shape[1]
    spec = _spec(
        "first", w, cut, bias=_kind(bias), kind=activation.kind, gated=gated, apart=apart,
        limit=activation.limit is not None,
    )  # fmt: skip
    return _run(
        spec, w, torch.empty(weights.numel(), inner, dtype=x.dtype, device=x.device), x, bias,
        -(-inner // (64 * cut.users)) if apart else -(-w.tiles // cut.tiles), table.count, top_k=weights.shape[1],
        alpha=activation.alpha, beta=activation.beta, limit=activation.limit or 0.0, **_routes(table),
    )  # fmt: skip


def second(h: Tensor, weights: Tensor, w: Fragments, bias: Tensor | None, table: Table, cut: Cut) -> Tensor:
    """As `hopper_moe.second`."""
    return _run(
        _spec("second", w, cut, bias=_kind(bias), weights=_kind(weights)), w,
        torch.empty(weights.numel(), w.shape[1], dtype=h.dtype, device=h.device), h, bias,
        -(-w.tiles // cut.tiles), table.count, weights=weights.data_ptr(), **_routes(table),
    )  # fmt: skip
