"""Weights to time, made directly as codes and scales, and calls that find none of them in a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from microscale.backends import cpu, cpu_core
from microscale.backends.cpu_core import ALIGNMENT
from microscale.bench.shapes import Shape
from microscale.canary import DTYPE_WORDS
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.quant import QuantTensor

COLD = 4  # weights are so many times the caches: with random experts at most a quarter is still there
MOST = 4096  # layers: of the smallest, caches then hold all, and making millions would take minutes
_POOL = (1 << 22) + 8 * 4099  # random bytes that are repeated; no multiple of a row


@dataclass(frozen=True)
class Call:
    """One call, its operands ready.

    Attributes:
        run: makes it, and returns its result.
        bytes: of codes and scales that it must read: those of the experts hit.
        flops: that it must do.
        layer: whose weights, an index into `Layers.packed`.
        x: [M, K] bf16.
        routes: ids and weights [M, T], float32, or None (linear).
    """

    run: Callable[[], Tensor]
    bytes: int
    flops: int
    layer: int
    x: Tensor
    routes: tuple[Tensor, Tensor] | None = None


class Layers:
    """Enough layers of one shape and format that by the time one is used again, it has left the caches.

    Args:
        cache: bytes of the machine's last-level caches.
        memory: bytes that all weights together may take; one layer is made in any case.
    Raises:
        BackendError: not even one layer fits.
    """

    def __init__(
        self, shape: Shape, fmt: Format, cache: int, memory: int, generator: torch.Generator
    ) -> None:
        self.shape, self.format = shape, fmt
        self._generator, self._next = generator, 0
        each = shape.bytes(fmt) * max(shape.experts, 1)
        if 2 * each > memory:  # once canonical, once packed
            raise BackendError(
                f"{shape.name} in {fmt.name} takes {2 * each / 1e9:.1f} GB to make, "
                f"and {memory / 1e9:.1f} GB may be used"
            )
        lead = (shape.experts,) if shape.op == "moe" else ()
        first = [cpu.pack(random_weight(fmt, (*lead, *m), generator)) for m in shape.matrices]
        count = max(1, min(-(-COLD * cache // each), memory // each, MOST))
        self.packed = [first, *([_copy(p) for p in first] for _ in range(count - 1))]
        self.biases = [
            torch.randn((*lead, n), generator=generator) * 0.1 if shape.bias else None
            for n, _ in shape.matrices
        ]

    @property
    def bytes(self) -> int:
        """Of all layers' packed weights."""
        return sum(p.buffer.numel() for layer in self.packed for p in layer)

    def call(self, m: int) -> Call:
        """A call on the next layer, with new activations and new routes."""
        shape, generator, index = self.shape, self._generator, self._next
        layer = self.packed[index]
        self._next = (index + 1) % len(self.packed)
        x = torch.randn(m, shape.k, generator=generator).to(torch.bfloat16)
        flops, each = shape.flops(m), shape.bytes(self.format)
        if shape.activation is None:
            return Call(lambda: cpu.linear(x, layer[0], self.biases[0]), each, flops, index, x)
        ids, weights = routes(m, shape.experts, shape.top_k, generator)
        activation, (b13, b2) = shape.activation, self.biases

        def run() -> Tensor:
            return cpu.moe(x, ids, weights, layer[0], layer[1], activation, b13=b13, b2=b2)

        return Call(run, each * len(ids.unique()), flops, index, x, (ids, weights))


class DenseLayers:
    """As `Layers`, of one linear shape with weights that are not quantised.

    Raises:
        BackendError: not even one layer fits.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, cache: int, memory: int, generator: torch.Generator
    ) -> None:
        self.shape, self._generator, self._next = shape, generator, 0
        each = shape.n * shape.k * dtype.itemsize
        if 2 * each > memory:  # drawn in a wider dtype, a part at a time
            raise BackendError(
                f"{shape.name} in {DTYPE_WORDS[dtype]} takes {2 * each / 1e9:.1f} GB to make, "
                f"and {memory / 1e9:.1f} GB may be used"
            )
        first = torch.empty((shape.n, shape.k), dtype=dtype).normal_(generator=generator)
        count = max(1, min(-(-COLD * cache // each), memory // each, MOST))
        self.weights = [first, *(first.clone() for _ in range(count - 1))]

    def call(self, m: int, product: Callable[[Tensor, Tensor], Tensor] | None = None) -> Call:
        """A call on the next layer, with new activations: of the core, or of another `product` (x, w)."""
        index, w = self._next, self.weights[self._next]
        self._next = (index + 1) % len(self.weights)
        x = torch.randn(m, self.shape.k, generator=self._generator).to(w.dtype)
        run = product or (lambda x, w: cpu_core.dense(x, w, None))
        return Call(lambda: run(x, w), w.nbytes, self.shape.flops(m), index, x)


def routes(m: int, experts: int, top_k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random ids [m, top_k], no expert twice for a token, and float32 weights of sum 1."""
    chosen = torch.rand(m, experts, generator=generator).topk(top_k)
    return chosen.indices, chosen.values / chosen.values.sum(-1, keepdim=True)


def random_weight(fmt: Format, shape: tuple[int, ...], generator: torch.Generator) -> QuantTensor:
    """Random finite codes, and scales by which a product with N(0, 1) activations is about N(0, 1).

    Every code occurs but NaN and infinity, which a checkpoint has not either and which kernels treat apart.
    """
    *lead, n, k = shape
    values = torch.tensor([v for v in fmt.element.values if math.isfinite(v)])
    size = float(1 / (values.square().mean().sqrt() * k**0.5))
    codes = _random_bytes((*lead, n, fmt.packed_columns(k)), generator, fmt)
    if k * fmt.element.bits % 8:
        codes[..., -1] = 0  # what is beyond K must be
    room = (*lead, *fmt.scale_shape(n, k))
    noise = _random_bytes(room, generator)
    if fmt.scale == "e8m0":
        scales = (noise % 3 + (126 + round(math.log2(size)))).to(torch.uint8)
        return QuantTensor(fmt, shape, codes, scales)
    if fmt.scale == "f32":
        return QuantTensor(fmt, shape, codes, size * (0.5 + noise.float() / 256))
    scales = 0x30 + noise % 16  # E4M3, 0.5 to 1.875
    return QuantTensor(fmt, shape, codes, scales, torch.full((1,) * (len(shape) - 1), size))


def _random_bytes(shape: tuple[int, ...], generator: torch.Generator, codes: Format | None = None) -> Tensor:
    size = math.prod(shape)
    pool = torch.randint(0, 256, (min(size, _POOL),), dtype=torch.uint8, generator=generator)
    if codes is not None and codes.element.bits == 8:
        finite = [code for code, value in enumerate(codes.element.values) if math.isfinite(value)]
        pool = torch.tensor(finite, dtype=torch.uint8)[pool.int() % len(finite)]
    return pool.repeat(-(-size // max(pool.numel(), 1)))[:size].view(shape)


def _copy(p: Any) -> Any:
    room = torch.empty(p.buffer.numel() + ALIGNMENT - 1, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT
    buffer = room[start : start + p.buffer.numel()].copy_(p.buffer)
    return replace(p, buffer=buffer)
