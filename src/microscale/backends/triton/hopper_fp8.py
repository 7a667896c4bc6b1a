"""Experts on Hopper whose weights and activations are FP8 codes, in CUDA C++: `hopper_fp8.cu`.

Codes are multiplied as they lie in memory, in the layout of every GPU. Results of w13 are rounded where they are made,
so both products are one kernel.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.triton import hopper_wide, nvrtc, rounded, tiles
from microscale.backends.triton.cuts import HOPPER_SHARED, STATIC_SHARED, wide_stages
from microscale.backends.triton.hopper_linear import Boxes, box_map_of_rows
from microscale.backends.triton.hopper_text import KINDS, Spec
from microscale.backends.triton.hopper_wide import ROOMS, address, find_tiles, float_kind, launch, lists_for
from microscale.backends.triton.layout import GROUP, Packed
from microscale.backends.triton.total import total
from microscale.formats import Format

# Of a unit: tokens, groups of warps that multiply 64 of them each, and tiles of 64 rows of weights for each group.
_MOST, _USERS, _EACH = 128, 2, 2
_ROWS = 64 * _USERS * _EACH
_STAGES = 4  # at most: more are no faster
_FOUR = 4  # steps whose scales come at a time
_FLOATS = (torch.bfloat16, torch.float32)  # biases and routing weights that the text knows


@dataclass(frozen=True)
class Codes(Spec):
    """What the text is compiled for."""

    @property
    def file(self) -> str:
        return "hopper_fp8.cu"

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.most,)

    @property
    def parts(self) -> tuple[str, ...]:
        lists = ("lists",) if self.routes else ()
        heads = ("rows", "unit", "fp8_sizes", "stages", *lists, "tiles", "fp8_divisor")
        return (*(f"hopper_{head}.h" for head in heads), self.file, "hopper_groups.h")

    @property
    def instructions(self) -> str:
        return "template <int N> struct Product;\n" + _product(self.most)

    @property
    def shared(self) -> int:
        scales = 2 * self.stages * 4 * _FOUR * (self.most + 4)
        return wide_stages(self.stages, self.most, _ROWS * GROUP) + scales

    @property
    def fixed(self) -> int:
        """Bytes of shared memory besides: barriers, units and lists."""
        return 64 * (self.stages + 2) + self.lists + 256

    def given(self) -> dict[str, object]:
        return super().given() | {"FP8": 1}


def _product(n: int) -> str:
    """`Product<N>::codes`: d = x @ w of 64 rows of x, N of w and 128 columns of E4M3 codes in shared memory."""
    sums = ", ".join(f"%{i}" for i in range(n // 2))
    outs = ", ".join(f'"+f"(d[{i}])' for i in range(n // 2))
    x, w = f"%{n // 2}", f"%{n // 2 + 1}"
    lines = ["{.reg .pred more;", ".reg .b64 x, w;", f"mov.b64 x, {x};", f"mov.b64 w, {w};"]
    for step in range(4):
        if step:
            lines += ["add.s64 x, x, 2;", "add.s64 w, w, 2;"]
        if step < 2:  # the first one is added to nothing
            lines.append(f"setp.{'eq' if step else 'ne'}.b64 more, {x}, {x};")
        lines.append(f"wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {{{sums}}}, x, w, more, 1, 1;")
    text = "".join(f'      "{line}\\n"\n' for line in (*lines, "}"))
    return (
        f"template <> struct Product<{n}> {{\n"
        f"  static DEVICE void codes(float (&d)[{n // 2}], unsigned long long x, unsigned long long w) {{\n"
        f'    asm volatile(\n{text}      : {outs} : "l"(x), "l"(w));\n  }}\n}};\n'
    )


class Operands(ctypes.Structure):
    """Of a product, as the text has it."""

    _fields_ = [
        *hopper_wide.Operands._fields_,
        ("scale_rows", ctypes.c_int),
        *[(n, ctypes.c_uint64) for n in ("x_scales", "y_scales")],
    ]


class Given(ctypes.Structure):
    """The kernel's argument, as the text has it."""

    _fields_ = [
        ("boxes", Boxes * 2),
        ("of", Operands * 2),
        *hopper_wide.Given._fields_[1:],
        ("_", ctypes.c_ubyte * 64),  # the text's ends at a multiple of so many
    ]


def refuse(
    x: Tensor,
    w13: Packed,
    w2: Packed,
    activation: Activation,
    biases: tuple[Tensor | None, Tensor | None],
    weights: Tensor,
    weight_on_input: bool,
) -> bool:
    """Whether these experts, with biases and routing weights of their dtypes, are for the kernels of every GPU instead.

    Gates and ups lie apart in this format's models, each a whole number of scale blocks.
    """
    dtypes = [t.dtype for t in (*biases, weights) if t is not None]
    return (
        weight_on_input
        or x.dtype != torch.bfloat16
        or {w13.format.name, w2.format.name} != {"fp8_block128"}
        or not (activation.apart and activation.kind in KINDS)
        or w2.shape[-1] % GROUP != 0
        or w2.shape[-2] % 32 != 0
        or any(dtype not in _FLOATS for dtype in dtypes)
        or nvrtc.refuse() is not None
    )


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Packed,
    w2: Packed,
    activation: Activation,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    act: Format,
    add_up: bool = True,
) -> Tensor:
    """As `moe.moe` with `act`, for what `refuse` does not; each expert's share is rounded once to x's dtype."""
    ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
    with tiles.on(x.device):
        shares = experts(x, ids, weights, w13, w2, (b13, b2), activation, act, expert_map)
        return total(shares, ids, expert_map, w13.shape[0], x.dtype, True) if add_up else shares


def _spec(
    w13: Packed,
    ids: Tensor,
    weights: Tensor,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    expert_map: Tensor | None,
) -> Codes:
    """With lists if programs may sort these routes themselves, and as many stages as fit."""
    lists = lists_for(ROOMS, w13, ids, expert_map)
    specs = (
        Codes(
            True, "e4m3", "f32", _MOST, stages, _USERS, _EACH, even=True, bias=tuple(map(float_kind, biases)),
            weights=float_kind(weights), top_k=ids.shape[1], kind=activation.kind, gated=True, apart=True,
            limit=activation.limit is not None, **rest,  # type: ignore[arg-type]
        )
        for rest in (lists, {}) if rest is not None for stages in range(_STAGES, 2, -1)
    )  # fmt: skip
    return next(s for s in specs if s.fixed <= STATIC_SHARED and s.shared + s.fixed <= HOPPER_SHARED)


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Packed,
    w2: Packed,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    act: Format,
    expert_map: Tensor | None,
) -> Tensor:
    """[M, H] bfloat16, [M, T] ids and routing weights -> [M * T, H], each route's share.

    A route without an expert here has none: see `total`.

    Args:
        ids: contiguous, as the weights.
        biases: of w13 and w2.
    """
    routes, inner = ids.numel(), w2.shape[-1]
    spec = _spec(w13, ids, weights, biases, activation, expert_map)
    codes, scales = rounded.codes_of(x, act, columns=_FOUR)
    found, progress, count, places = find_tiles(spec, ids, expert_map, w13.shape[0], True)
    h = torch.empty(places, inner, dtype=torch.uint8, device=x.device)
    fours = -(-inner // (GROUP * _FOUR))
    h_scales = torch.empty(places, fours * _FOUR, dtype=torch.float32, device=x.device)
    y = torch.empty(routes, w2.shape[1], dtype=x.dtype, device=x.device)
    of = (
        _operands(w13, h, codes, scales, h_scales, biases[0], inner, inner // GROUP),
        _operands(w2, y, h, h_scales, None, biases[1], w2.shape[1], -(-w2.shape[1] // _ROWS)),
    )
    boxes = (Boxes.from_buffer_copy(box_map_of_rows(w.codes.flatten(0, 1))) for w in (w13, w2))
    given = Given(
        (Boxes * 2)(*boxes), (Operands * 2)(*of), *map(address, found), progress.data_ptr(), weights.data_ptr(),
        alpha=activation.alpha, beta=activation.beta, limit=activation.limit or 0.0,
        ids=ids.data_ptr(), expert_map=address(expert_map), routes=routes,
        known=0 if expert_map is None else expert_map.numel(),
    )  # fmt: skip
    launch(spec, x.device, count * sum(o.blocks for o in of), given)
    return y


def _operands(
    w: Packed,
    y: Tensor,
    x: Tensor,
    x_scales: Tensor,
    y_scales: Tensor | None,
    bias: Tensor | None,
    width: int,
    blocks: int,
) -> Operands:
    """`width`: columns of y; `blocks`: units of a tile of tokens."""
    rows = w.shape[-2]
    return Operands(
        y.data_ptr(), x.data_ptr(), 0, w.scales.data_ptr(), 0, 0, address(bias), rows, width, w.groups * GROUP,
        -(-rows // 64), w.groups, blocks, w.scales.shape[-1], x_scales.data_ptr(), address(y_scales),
    )  # fmt: skip
