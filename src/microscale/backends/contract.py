"""What a backend's module offers. A `Protocol`, not a base class: a module with these functions is a backend."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from microscale.activations import Activation
from microscale.formats import Format
from microscale.quant import QuantTensor


class Contract(Protocol):
    """`Packed` is whatever the backend's `pack` returns; only the same backend may look inside.

    A module whose `pack` copies says `REPACKS = True`: layers then let go of the canonical tensor, so that weights are
    not in memory twice, and get it back from `unpack`.

    A module may have `pack_for(w, act)`, too, where the layout depends on the format of activations (None: 16-bit), and
    is then asked instead of `pack`; and `shares`: what its `moe` adds up, for a caller who does (see
    `backends.triton.shares`).
    """

    def pack(self, w: QuantTensor) -> Any:
        """The backend's own layout of [N, K] or [E, N, K] weights; may alias `w`. Padding lives only in here."""

    def unpack(self, packed: Any) -> QuantTensor:
        """The exact inverse of `pack`."""

    def linear(self, x: Tensor, w: Any, bias: Tensor | None = None, *, act: Format | None = None) -> Tensor:
        """y = x @ dequantize(w).T + bias, as `reference.linear`, in x's dtype.

        Args:
            x: [..., K] bf16, fp16 or fp32; any leading dimensions, zero rows included.
            act: x is quantised to this format first; None: it is used as it is.
        """

    def moe(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        w13: Any,
        w2: Any,
        activation: Activation,
        *,
        b13: Tensor | None = None,
        b2: Tensor | None = None,
        expert_map: Tensor | None = None,
        weight_on_input: bool = False,
        act: Format | None = None,
    ) -> Tensor:
        """The weighted sum over each token's experts, as `reference.moe`, in x's dtype.

        Args:
            x: [M, H]; M may be 0.
            topk_ids: [M, T] global expert ids, integer; -1: no expert.
            topk_weights: [M, T].
            w13, w2: packed [E, rows, H] and [E, H, I].
            expert_map: [global experts] -> local index or -1 for "not here".
            weight_on_input: T = 1 only: the routing weight multiplies x instead of the result.
        """
