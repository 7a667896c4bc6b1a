"""Experts of few tokens on Hopper in CUDA C++, `hopper_rings.cu`, for cuts with `rings`.

Both products are one kernel, in which groups of warps go at a pace of their own, and which finds its tiles of tokens
itself: things that Gluon cannot say. `nvrtc` compiles the text when it is first needed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.triton import hopper_wide
from microscale.backends.triton.cuts import HOPPER_SHARED, STATIC_SHARED, Cut
from microscale.backends.triton.fragments import COLUMNS, ROWS, Fragments
from microscale.backends.triton.hopper_text import Spec
from microscale.backends.triton.hopper_wide import Given, address, float_kind, lists_for
from microscale.backends.triton.placement import LANDS
from microscale.backends.triton.routing import zeros

ROOMS = (64, 256, 512, 1024, 2048)  # of routes
MOST = 32  # tokens of a tile
TOKEN_STAGES = 3
_LEAST_STEPS = 3  # of a stage: with fewer, warps mostly wait for barriers


@dataclass(frozen=True)
class Rings(Spec):
    """What `hopper_rings.cu` is compiled for; `users` are groups of warps that multiply.

    Attributes:
        steps: of 64 columns in a stage, of w13 and of w2, whose columns they divide.
        chunks: of 64 columns, of w13 or w2, whichever has more.
    """

    steps: tuple[int, int] = (0, 0)
    chunks: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every number of eights."""
        return tuple(range(self.most, 0, -8))

    @property
    def file(self) -> str:
        return "hopper_rings.cu"

    @property
    def parts(self) -> tuple[str, ...]:
        loop = "ring_eight" if self.most == 8 else "ring_pieces"
        heads = ("rows", "unit", "sizes", "stages", "steps", "lists", "ring_loop", loop)
        return (*(f"hopper_{head}.h" for head in heads), self.file)

    @property
    def threads(self) -> int:
        return 128 * self.users + 32 * (self.users + 2)

    @property
    def shared(self) -> int:
        step = 512 * len(LANDS[self.element]) + (256 if self.scale == "e4m3" else 128)
        rings = self.users * self.stages * self.each * max(self.steps) * step
        return 128 + rings + TOKEN_STAGES * self.most * (128 * max(self.steps) + 16)

    @property
    def fewer(self) -> int:
        return 0

    @property
    def fixed(self) -> int:
        """Bytes of shared memory besides: barriers, lists, what comes with tokens, results on their way."""
        tiles = self.users * self.each
        ratios = 4 * tiles * (self.chunks // 2 + 2) if self.scale == "f32" else 0
        of_rows = sum(256 if any(there) else 16 for there in (self.bias, self.row_scale))
        beside = of_rows * tiles + 8 * self.most + ratios
        apart = 2048 * self.users if self.apart and self.each == 1 else 0
        return 16 * self.stages * self.users + self.lists + 2 * beside + apart + 256

    @property
    def finders(self) -> int:
        return self.threads - 32

    def given(self) -> dict[str, object]:
        return super().given() | {
            "STEPS": ", ".join(map(str, self.steps)),
            "CHUNKS": self.chunks,
            "TOKEN_STAGES": TOKEN_STAGES,
        }


def _steps(most: int, w: Fragments) -> int:
    """Of a stage: as many as divide the columns."""
    return max(n for n in range(1, max(most, 1) + 1) if w.chunks % n == 0)


def spec_of(
    cuts: tuple[Cut, Cut],
    weights: tuple[Fragments, Fragments],
    activation: Activation,
    biases: tuple[Tensor | None, Tensor | None],
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_map: Tensor | None,
    weight_on_input: bool,
) -> Rings | None:
    """For a call of experts with these cuts of w13 and w2; None: it is for other kernels.

    Args:
        biases: of w13 and w2.
    """
    w13, w2 = weights
    cut, apart = cuts[0], activation.apart
    users, each = cut.warps // 4, cut.tiles // (cut.warps // 4)
    if apart and each == 1 and users % 2:
        users -= 1  # groups of warps take turns in having gates and ups
    lists = lists_for(ROOMS, w13, topk_ids, expert_map)
    if (
        weight_on_input
        or users < 2
        or lists is None
        or cut.block_m > MOST
        or w13.format != w2.format
        or any(w.shape[-1] % COLUMNS for w in weights)
        or (apart and w13.shape[1] // 2 % ROWS)
        or any(t is not None and t.data_ptr() % 16 for t in biases)
        or any(hopper_wide.refuse(w, activation, biases, topk_weights) for w in weights)
    ):
        return None
    made = hopper_wide.spec_of(
        True, weights, cut, bias=tuple(map(float_kind, biases)), weights=float_kind(topk_weights),
        top_k=topk_ids.shape[1], kind=activation.kind, gated=activation.gated, apart=apart,
        limit=activation.limit is not None,
    )  # fmt: skip
    given = {name: getattr(made, name) for name in Spec.__dataclass_fields__}
    spec = Rings(
        **given | lists | {"users": users, "each": each},
        chunks=max(w13.chunks, w2.chunks),
    )
    for part, stages in itertools.product((1, 2, 3), range(spec.stages, 1, -1)):
        steps = _steps(cuts[0].chunks // part, w13), _steps(cuts[1].chunks // part, w2)
        fitted = replace(spec, stages=stages, steps=steps)
        fits = fitted.fixed <= STATIC_SHARED and fitted.shared + fitted.fixed <= HOPPER_SHARED
        if fits and min(steps) >= _LEAST_STEPS:
            return fitted
    return None


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Fragments,
    w2: Fragments,
    biases: tuple[Tensor | None, Tensor | None],
    activation: Activation,
    expert_map: Tensor | None,
    spec: Rings,
) -> Tensor:
    """[M, H] bfloat16, [M, T] ids and routing weights -> [M * T, H], each route's share.

    A route without an expert here has none: see `total`.

    Args:
        ids: contiguous, as the weights.
        biases: of w13 and w2.
        spec: of `spec_of`.
    """
    routes = ids.numel()
    if x.data_ptr() % 16:
        x = x.clone()
    inner = w13.shape[1] // 2 if activation.gated else w13.shape[1]
    tiles = spec.most_tiles(routes)
    h = torch.empty(spec.most * tiles, inner, dtype=x.dtype, device=x.device)
    y = torch.empty(routes, w2.shape[1], dtype=x.dtype, device=x.device)
    pairs = spec.users * spec.each / 2  # tiles of gates in a unit, where ups lie apart
    blocks = (
        int(-(-inner // (ROWS * pairs))) if activation.apart else -(-w13.tiles // (spec.users * spec.each)),
        -(-w2.tiles // (spec.users * spec.each)),
    )
    progress = zeros(2 + tiles, x.device)
    given = Given(
        (hopper_wide.Operands * 2)(
            hopper_wide.operands(w13, h, x, biases[0], blocks[0]), hopper_wide.operands(w2, y, h, biases[1], blocks[1])
        ),
        progress=progress.data_ptr(), weights=weights.data_ptr(),
        alpha=activation.alpha, beta=activation.beta, limit=activation.limit or 0.0,
        ids=ids.data_ptr(), expert_map=address(expert_map), routes=routes,
        known=0 if expert_map is None else expert_map.numel(),
    )  # fmt: skip
    hopper_wide.launch(spec, x.device, tiles * sum(blocks), given)
    return y
