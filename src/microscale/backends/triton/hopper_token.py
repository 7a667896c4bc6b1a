"""A single token's experts on Hopper, which their kernels choose by the router's logits: see `hopper_routes`."""

from __future__ import annotations

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.triton import hopper_moe, tiles
from microscale.backends.triton.cuts import Cut
from microscale.backends.triton.fragments import Fragments
from microscale.backends.triton.routing import Table
from microscale.backends.triton.small import Choice


def takes(x: Tensor, choice: Choice, cuts: tuple[Cut, Cut]) -> bool:
    """Whether the kernels can: those for a few tokens, in bfloat16, of a choice that is simple enough."""
    return choice.block > 0 and x.dtype == torch.bfloat16 and all(cut.few for cut in cuts)


def shares(
    x: Tensor,
    choice: Choice,
    w13: Fragments,
    w2: Fragments,
    activation: Activation,
    b13: Tensor | None,
    b2: Tensor | None,
    cuts: tuple[Cut, Cut],
) -> Tensor:
    """[1, H] -> [top_k, N]: the bits of `hopper_experts.moe` without its sum, of `choice.routes()`.

    Args:
        cuts: of w13 and w2, as `of_experts` gave them for these matrices.
    """
    logits = choice.logits
    table = Table(logits, logits, logits, logits, logits, choice.top_k)
    weights = logits.new_empty(1, choice.top_k, dtype=choice.dtype)  # for its dtype; nothing is written
    rest = (False, True, None, True, choice.block)
    with tiles.on(x.device):
        h = hopper_moe.first(x, weights, w13, b13, activation, table, cuts[0], *rest)
        return hopper_moe.second(h, weights, w2, b2, table, cuts[1], *rest)
