"""A call of experts on Hopper, by the kernels that its cuts are of: `hopper_rings`, `hopper_wide` or `hopper_moe`."""

from __future__ import annotations

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.triton import hopper_rings, hopper_wide, routing, tiles
from microscale.backends.triton.cuts import Cut, moe_cuts
from microscale.backends.triton.fragments import Fragments
from microscale.backends.triton.hopper import PARTS, as_parts
from microscale.backends.triton.hopper_moe import first, second
from microscale.backends.triton.ordering import tokens_in_order
from microscale.backends.triton.routing import Table
from microscale.backends.triton.total import total


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Fragments,
    w2: Fragments,
    activation: Activation,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    weight_on_input: bool,
    cuts: tuple[Cut, Cut] | None = None,
    pdl: bool = True,
    direct: bool | None = None,
    add_up: bool = True,
) -> Tensor:
    """As `moe.moe`; each expert's share, like the intermediate, is rounded once to x's dtype.

    Args:
        cuts: of w13 and w2, with the same block_m and tail; `cuts.moe_cuts` by default.
        direct: no routing, for one token; the default there, but for cuts with `bulk`.
    """
    (m, top_k), experts = topk_ids.shape, w13.shape[0]
    asked = ((w13.format, w2.format), m, top_k, experts, w2.shape[-1], PARTS[x.dtype])
    cut13, cut2 = cuts or moe_cuts(*asked)
    ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
    biases, matrices = (b13, b2), (w13, w2)
    if cut13.rings:
        spec = hopper_rings.spec_of(
            (cut13, cut2), matrices, activation, biases, ids, weights, expert_map, weight_on_input
        )
        if spec is not None:
            with tiles.on(x.device):
                shares = hopper_rings.experts(
                    as_parts(x), ids, weights, *matrices, biases, activation, expert_map, spec
                )
                return total(shares, ids, expert_map, experts, x.dtype, pdl) if add_up else shares
        cut13, cut2 = moe_cuts(*asked, rings=False)
    if cut13.wide or cut2.wide:
        cut13, cut2 = hopper_wide.taken(
            (cut13, cut2), matrices, activation, biases, topk_weights, weight_on_input
        )
    cut13 = cut13.of_experts(w13, activation.apart)
    cut2 = cut2.of_experts(w2)
    # These need tokens in the order that routing finds.
    direct = (m == 1 if direct is None else direct) and not (cut13.bulk or cut2.bulk)
    # Between float16 and wider activations and the kernels that read them stand others, which do not start early.
    pdl = pdl and x.dtype == torch.bfloat16
    with tiles.on(x.device):
        if cut13.wide:
            shares = hopper_wide.experts(
                as_parts(x), ids, weights, w13, w2, biases, activation, cut13, expert_map, pdl
            )
        else:
            if direct:
                table = Table(ids, ids, ids, ids, ids, top_k)
            else:
                table = routing.route(ids, expert_map, experts, cut13.block_m, pdl)
            if cut13.bulk:
                x = tokens_in_order(table, x, top_k, experts, pdl)
            h = first(
                x, weights, w13, b13, activation, table, cut13, weight_on_input, pdl, expert_map, direct
            )
            shares = second(h, weights, w2, b2, table, cut2, weight_on_input, pdl, expert_map, direct)
        return total(shares, ids, expert_map, experts, x.dtype, pdl) if add_up else shares
