"""Experts of many tokens on Hopper in CUDA C++, `hopper_wide.cu`, for cuts that are `wide`; linears: `hopper_linear`.

Groups of warps of one program work without a barrier between them, and a program's number of tokens is fitted to what
an expert has: two things that Gluon cannot say. `nvrtc` compiles the text when it is first needed.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.triton import nvrtc, routing, tiles
from microscale.backends.triton.cuts import HOPPER_SHARED, STATIC_SHARED, Cut
from microscale.backends.triton.fragments import Fragments
from microscale.backends.triton.hopper_text import KINDS, MOST_OF_TWO, Spec, text
from microscale.backends.triton.layout import Packed
from microscale.backends.triton.routing import zeros

ROOMS = (512, 1024)  # of routes that programs sort themselves
# With fewer columns of w2 and up to so many tokens, units are too short for codes by the copying engine.
FEW_COLUMNS, FEW_TOKENS = 1024, 48
_IDS = {torch.int32: 4, torch.int64: 8}
_FLOATS = {torch.bfloat16: 1, torch.float32: 2}  # as `Spec.bias` says it


class Operands(ctypes.Structure):
    """Of a product, as the text has it."""

    _fields_ = [
        *[(n, ctypes.c_uint64) for n in ("y", "x", "codes", "scales", "ratios", "row_scale", "bias")],
        *[(n, ctypes.c_int) for n in ("rows", "width", "columns", "tiles", "chunks", "blocks")],
    ]


class Given(ctypes.Structure):
    """The kernel's argument, as the text has it."""

    _fields_ = [
        ("of", Operands * 2),
        *[
            (n, ctypes.c_uint64)
            for n in ("tile_experts", "tile_starts", "ends", "order", "progress", "weights")
        ],
        *[(n, ctypes.c_float) for n in ("alpha", "beta", "limit")],
        *[(n, ctypes.c_uint64) for n in ("ids", "expert_map")],
        *[(n, ctypes.c_int) for n in ("routes", "known")],
    ]


@cache
def _kernel(spec: Spec, device: int) -> nvrtc.Kernel:
    if spec.shared > HOPPER_SHARED:
        raise nvrtc.CompileError(
            f"{spec.file}: {spec.stages} stages of {spec.most} tokens and {64 * spec.users * spec.each} rows are "
            f"{spec.shared} bytes of shared memory, of {HOPPER_SHARED} that there are: see Cut.fitted"
        )
    return nvrtc.kernel(spec.file, text(spec), spec.function, spec.shared, device)


def launch(spec: Spec, device: torch.device, units: int, given: ctypes.Structure) -> None:
    """On the current stream; `units`: of work, for as many programs at most as there are multiprocessors."""
    index = torch.cuda.current_device() if device.index is None else device.index
    _kernel(spec, index).launch(min(units, tiles.target(device).units), spec.threads, given, early=True)


def refuse(
    w: Fragments,
    activation: Activation | None,
    biases: tuple[Tensor | None, ...],
    weights: Tensor | None = None,
) -> bool:
    """Whether these matrices, with biases and routing weights of their dtypes, are for Gluon's kernels instead."""
    dtypes = [t.dtype for t in (*biases, weights) if t is not None]
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
    biases: tuple[Tensor | None, ...],
    routing_weights: Tensor,
    weight_on_input: bool,
) -> tuple[Cut, Cut]:
    """These cuts of w13 and w2, or Gluon's for as many tokens. A wide one is for both, in one kernel.

    Args:
        biases: of w13 and w2.
    """
    cut = cuts[0].of_experts(weights[0], activation.apart)
    if (
        weight_on_input
        or cuts[0] != cuts[1]
        or weights[0].format != weights[1].format
        or (activation.apart and cut.block_m > MOST_OF_TWO)
        or any(refuse(w, activation, biases, routing_weights) for w in weights)
    ):
        return tuple(cut.usual(tail=True) if cut.wide else cut for cut in cuts)  # type: ignore[return-value]
    return cut, cut


def spec_of(experts: bool, matrices: tuple[Fragments, ...], cut: Cut, **rest: object) -> Spec:
    """For these weights, of one format."""
    element, scale = matrices[0].format.element.name, matrices[0].format.scale
    return Spec(
        experts, element, scale, cut.block_m, cut.stages, cut.users, cut.tiles // cut.users,
        even=all(w.shape[-1] % 64 == 0 for w in matrices),
        row_scale=tuple(w.row_scale is not None for w in matrices), **rest,  # type: ignore[arg-type]
    )  # fmt: skip


def address(t: Tensor | None) -> int:
    """Or 0."""
    return 0 if t is None else t.data_ptr()


def operands(w: Fragments, y: Tensor, x: Tensor, bias: Tensor | None, blocks: int) -> Operands:
    """`blocks`: of rows, that a tile of tokens has."""
    return Operands(
        y.data_ptr(), x.data_ptr(), w.codes.data_ptr(), w.scales.data_ptr(), address(w.ratios),
        address(w.row_scale), address(bias), w.shape[-2], y.shape[-1], w.shape[-1], w.tiles, w.chunks, blocks,
    )  # fmt: skip


def float_kind(t: Tensor | None) -> int:
    """As `Spec.bias` says it."""
    return 0 if t is None else _FLOATS[t.dtype]


def lists_for(
    rooms: tuple[int, ...], w13: Fragments | Packed, topk_ids: Tensor, expert_map: Tensor | None
) -> dict[str, int] | None:
    """What `Spec` says of programs that sort these routes themselves; None: they are too many, or numbers of a kind
    that the text does not know.

    Args:
        rooms: numbers of routes that there may be room for, each another kernel, ascending.
    """
    dtypes = [t.dtype for t in (topk_ids, expert_map) if t is not None]
    room = next((room for room in rooms if room >= topk_ids.numel()), 0)
    if room == 0 or any(dtype not in _IDS for dtype in dtypes):
        return None
    map_bytes = 0 if expert_map is None else _IDS[expert_map.dtype]
    return {"routes": room, "known": w13.shape[0], "id_bytes": _IDS[topk_ids.dtype], "map_bytes": map_bytes}


def find_tiles(
    spec: Spec, ids: Tensor, expert_map: Tensor | None, experts: int, pdl: bool
) -> tuple[tuple[Tensor | None, ...], Tensor, int, int]:
    """A table's tensors as `Given` has them, if programs do not sort routes themselves; what they count in; how many
    tiles there may be; and places of tokens between the products."""
    if spec.routes:
        # An expert's last tile may be partly empty, and its tokens have places for whole tiles.
        count = spec.most_tiles(ids.numel())
        return (None,) * 4, zeros(2 + count, ids.device), count, count * spec.most
    table = routing.route(ids, expert_map, experts, spec.most, pdl)
    found = (table.tile_experts, table.tile_starts, table.ends, table.order)
    return found, table.progress, table.count, ids.numel()


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Fragments,
    w2: Fragments,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    cut: Cut,
    expert_map: Tensor | None = None,
    pdl: bool = True,
) -> Tensor:
    """[M, H] bfloat16, [M, T] ids and routing weights -> [M * T, H], each route's share.

    A route without an expert here has none: see `total`.

    Args:
        ids: contiguous, as the weights.
        biases: of w13 and w2.
    """
    gated, apart, routes = activation.gated, activation.apart, ids.numel()
    inner = w13.shape[1] // 2 if gated else w13.shape[1]
    blocks = -(-inner // (64 * cut.users)) if apart else -(-w13.tiles // cut.tiles), -(-w2.tiles // cut.tiles)
    if cut.users > 2 and cut.stages % 2:
        cut = replace(cut, stages=max(cut.stages - 1, 4))
    lists = lists_for(ROOMS, w13, ids, expert_map) or {}
    spec = spec_of(
        True, (w13, w2), cut, bias=tuple(map(float_kind, biases)), weights=float_kind(weights), top_k=weights.shape[1],
        kind=activation.kind, gated=gated, apart=apart, limit=activation.limit is not None,
        engine=w2.shape[-1] >= FEW_COLUMNS or cut.block_m > FEW_TOKENS, **lists,
    )  # fmt: skip
    fixed = cut.shared(w13.format, 1) - spec.shared + spec.lists
    if lists and (fixed > STATIC_SHARED or spec.shared + fixed > HOPPER_SHARED):
        spec = replace(spec, routes=0, known=0, id_bytes=0, map_bytes=0)
    found, progress, count, places = find_tiles(spec, ids, expert_map, w13.shape[0], pdl)
    h = torch.empty(places, inner, dtype=x.dtype, device=x.device)
    y = torch.empty(routes, w2.shape[1], dtype=x.dtype, device=x.device)
    given = Given(
        (Operands * 2)(
            operands(w13, h, x, biases[0], blocks[0]), operands(w2, y, h, biases[1], blocks[1])
        ),
        *map(address, found), progress.data_ptr(), weights.data_ptr(),
        alpha=activation.alpha, beta=activation.beta, limit=activation.limit or 0.0,
        ids=ids.data_ptr(), expert_map=address(expert_map), routes=routes,
        known=0 if expert_map is None else expert_map.numel(),
    )  # fmt: skip
    launch(spec, x.device, count * sum(blocks), given)
    return y
