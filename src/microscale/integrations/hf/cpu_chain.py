"""A token through all layers of a model in one call of the C++ core: its steps, put down once over memory that stays.

The slow twin is transformers' forward of the same token. What its modules round to the model's dtype is rounded here,
and sums are float32, as everywhere in the core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from microscale import _core
from microscale.backends import cpu_core
from microscale.backends.cpu_core import DTYPE_IDS, KIND_IDS, ROUTERS
from microscale.integrations.hf.cpu_cache import TokenCache, TokenLayer
from microscale.integrations.hf.cpu_parts import Experts, Layer, Mlp, Norm, Parts, Product

# Where a matrix of a chain is: the address of its first number, and numbers from one row to the next.
Place = tuple[int, int]


class TokenChain:
    """What computes [B, 1] ids to logits over a `TokenCache` that holds a prompt.

    Attributes:
        ids: int64 [B, 1], read by each run.
        logits: [B, 1, vocabulary], written by each run.
    """

    def __init__(self, parts: Parts, cache: TokenCache, batch: int) -> None:
        self._parts, self._batch, self._dtype = parts, batch, DTYPE_IDS[parts.dtype]
        self._chain: Any = _core.Chain(self._dtype, batch)
        self._matrices: dict[tuple[str, int], Tensor] = {}
        self._kept: list[Any] = []  # an address does not keep what it is of
        count, hidden = parts.embedding.shape
        with torch.inference_mode(False):
            self.ids = torch.zeros(batch, 1, dtype=torch.int64, device="cpu")
            self._cos, self._sin = cache.turns(parts.rotary, parts.embedding[:1])
            x, self._y = self._matrix("x", hidden), self._matrix("y", hidden)
            self._chain.embed(self._at(parts.embedding), count, hidden, self._at(self.ids), self._at(x))
            more: Place | None = None
            for layer, kept in zip(parts.layers, cache.steps, strict=True):
                more = self._layer(layer, kept, x, more)
            self._norm(parts.norm, x, more)
            (place,) = self._products([parts.head], self._y, "logits")
        head = self._matrices["logits", parts.head.n]
        assert place == (head.data_ptr(), parts.head.n)
        self.logits = head[:, None]

    def run(self, position: int) -> None:
        """Take `ids` through the model: their keys and values to the cache, `logits` for the token behind them."""
        cpu_core.run(self._chain, position)

    def _layer(self, layer: Layer, kept: Any, x: Tensor, more: Place | None) -> Place:
        """Returns what is to be added to the stream behind it."""
        self._norm(layer.first, x, more)
        heads, key_heads = layer.q.n // layer.width, layer.k.n // layer.width
        found = self._matrix("found", heads * layer.width)
        q, k, v = self._products([layer.q, layer.k, layer.v], self._y, "qkv")
        norm = layer.q_norm or layer.first  # of which the dtype alone counts where no head is normed
        self._chain.attend(
            (heads, key_heads, layer.width, 2 * self._cos.shape[1], kept.slots, self._cos.shape[0]),
            (q[0], k[0], v[0]),
            (q[1], k[1], v[1]),
            tuple(0 if n is None else self._at(n.weight) for n in (layer.q_norm, layer.k_norm)),
            DTYPE_IDS[norm.weight.dtype],
            norm.twice,
            norm.epsilon,
            layer.scale,
            self._at(self._cos),
            self._at(self._sin),
            *self._slots(kept),
            0 if layer.sinks is None else self._at(layer.sinks),
            self._at(found),
        )
        (more,) = self._products([layer.o], found, "more")
        self._norm(layer.second, x, more)
        if isinstance(layer.mlp, Mlp):
            return self._mlp(layer.mlp)
        return self._experts(layer.mlp)

    def _slots(self, kept: TokenLayer) -> tuple[int, int]:
        for t in (kept.keys, kept.values):
            assert t.is_contiguous()
            assert t.dtype is self._parts.dtype
        return self._at(kept.keys), self._at(kept.values)

    def _mlp(self, mlp: Mlp) -> Place:
        (gate, stride), (up, _) = self._products([mlp.gate, mlp.up], self._y, "gate")
        middle = self._matrix("middle", mlp.up.n)
        self._chain.gate(KIND_IDS[mlp.activation], mlp.up.n, stride, gate, up, self._at(middle))
        (more,) = self._products([mlp.down], middle, "more")
        return more

    def _experts(self, experts: Experts) -> Place:
        count, top_k, a = experts.router.n, experts.top_k, experts.runner.activation
        ((logits, _),) = self._products([experts.router], self._y, "routes")
        ids = self._matrix("ids", top_k, torch.int64)
        weights = self._matrix("weights", top_k, torch.float32)
        how = (ROUTERS.index(experts.rule), experts.renormalize, DTYPE_IDS[experts.shares])
        self._chain.route(logits, count, *how, top_k, self._at(ids), self._at(weights))
        placement = experts.runner.placement
        assert placement is not None
        w13, w2 = placement.packed
        b13, b2 = experts.runner.biases()
        y = self._matrix("more", w2.shape[1])
        self._chain.moe(
            self._at(w13.buffer),
            self._at(w13.outer),
            self._at(w2.buffer),
            self._at(w2.outer),
            self._at(self._y),
            self._at(ids),
            self._at(weights),
            top_k,
            KIND_IDS[a.kind],
            a.gated,
            a.interleaved,
            a.alpha,
            a.beta,
            math.inf if a.limit is None else a.limit,
            self._at(cpu_core.float32(b13)),
            self._at(cpu_core.float32(b2)),
            self._at(y),
        )
        return self._at(y), w2.shape[1]

    def _norm(self, norm: Norm, x: Tensor, more: Place | None) -> None:
        """x += more, and its norm to y."""
        w, added = norm.weight, 0 if more is None else more[0]
        where = (self._at(x), added, DTYPE_IDS[w.dtype], self._at(w))
        self._chain.norm(*where, w.numel(), norm.epsilon, norm.twice, self._at(self._y))

    def _products(self, products: Sequence[Product], x: Tensor, name: str) -> list[Place]:
        """Where each product of x is: side by side, unless a weight is packed."""
        if not any(p.packed for p in products):
            width = sum(p.n for p in products)
            y = self._matrix(name, width)
            weights = [(self._at(p.weight), p.weight.stride(0), p.n, self._at(p.bias)) for p in products]
            self._chain.dense(self._dtype, products[0].k, weights, self._at(x), self._at(y))
            places, at = [], self._at(y)
            for p in products:
                places.append((at, width))
                at += p.n * y.itemsize
            return places
        places = []
        for i, p in enumerate(products):
            if not p.packed:
                places += self._products([p], x, f"{name} {i}")
                continue
            y, w = self._matrix(f"{name} {i}" if len(products) > 1 else name, p.n), p.weight
            bias = self._at(cpu_core.float32(p.bias))
            self._chain.linear(self._at(w.buffer), self._at(w.outer), bias, p.k, self._at(x), self._at(y))
            places.append((self._at(y), p.n))
        return places

    def _matrix(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[B, width] for all layers."""
        key = (name, width)
        if key not in self._matrices:
            like = self._parts.embedding  # wherever tensors are made by default
            self._matrices[key] = like.new_empty(self._batch, width, dtype=dtype or like.dtype)
        return self._matrices[key]

    def _at(self, t: Tensor | None) -> int:
        if t is None:
            return 0
        self._kept.append(t)
        return t.data_ptr()
