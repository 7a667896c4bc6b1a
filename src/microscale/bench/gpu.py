"""What the CUDA benchmarks share: layers of random weights, times from graphs, and what the GPU could do at best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.backends import triton as backend
from microscale.backends.triton.fragments import Fragments
from microscale.formats import FORMATS
from microscale.quant import QuantTensor

Weights = backend.Packed | Fragments


@dataclass(frozen=True)
class Experts:
    """The experts of one layer of a model."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    activation: Activation
    bias: bool


MODELS = {
    "gpt-oss-20b": Experts(32, 4, 2880, 2880, GPT_OSS, True),
    "gpt-oss-120b": Experts(128, 4, 2880, 2880, GPT_OSS, True),
    "qwen3-30b-a3b": Experts(128, 8, 2048, 768, Activation("silu"), False),
}
# As much as a GPU of 80 GB has room for; timed where they are asked for by name.
LARGE = {
    "qwen3-235b-a22b": Experts(128, 8, 4096, 1536, Activation("silu"), False),
    "deepseek-v3": Experts(256, 8, 7168, 2048, Activation("silu"), False),
}
LINEARS = {"8192x8192": (8192, 8192), "5120x2880": (5120, 2880)}


@dataclass(frozen=True)
class Times:
    """Microseconds of one call: the median of replays, and the quartiles around it."""

    median: float
    low: float
    high: float


def interleaved(kinds: dict[str, list[Callable[[], object]]], budget_ms: float = 40) -> dict[str, Times]:
    """Times of calls of each kind, all calls of a kind in one graph, and the graphs replayed in turn.

    Args:
        budget_ms: that the replays of a kind may take, but there are 5 at least.
    """
    graphs = {}
    for name, calls in kinds.items():
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in calls:
                call()

    def once(graph: torch.cuda.CUDAGraph) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    for graph in graphs.values():
        once(graph)
    longest = max(once(graph) for graph in graphs.values())
    runs = max(5, min(25, int(budget_ms / max(longest, 0.05))))
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(runs):
        for name, graph in graphs.items():
            found[name].append(once(graph) * 1e3 / len(kinds[name]))
    order = {name: sorted(times) for name, times in found.items()}
    return {
        name: Times(*(times[i] for i in (runs // 2, runs // 4, runs - 1 - runs // 4)))
        for name, times in order.items()
    }


def microseconds(calls: list[Callable[[], object]], budget_ms: float = 40) -> float:
    """Median of one call, all of them in one graph."""
    return interleaved({"": calls}, budget_ms)[""].median


@triton.jit
def _read_kernel(x, y, n, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.int32)
    for i in range(tl.program_id(0), n // BLOCK, tl.num_programs(0)):
        block = x + tl.cast(i, tl.int64) * BLOCK
        acc += tl.load(block + tl.arange(0, BLOCK))
    tl.store(y + tl.program_id(0), tl.sum(acc, 0))


def read_rate(size: int = 1 << 30, device: torch.device | str = "cuda") -> float:
    """GB/s that can be read, of so many bytes."""
    with torch.cuda.device(device):
        x = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
        y = torch.zeros(1 << 16, dtype=torch.int32, device="cuda")
        units = torch.cuda.get_device_properties(x.device).multi_processor_count
        read = min(
            microseconds([partial(_read_kernel[(p * units,)], x, y, x.numel(), BLOCK=block, num_warps=warps)])
            for p, block, warps in ((8, 4096, 4), (16, 2048, 4), (4, 8192, 8))
        )
    return size / read / 1e3


def ceilings() -> tuple[float, float]:
    """GB/s that can be read, and TFLOP/s of bfloat16 products."""
    read = read_rate()
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return read, 2 * 8192**3 / microseconds([lambda: a @ b.T] * 2) / 1e6


def random_weights(name: str, *shape: int) -> Weights:
    """Any codes but infinities and NaNs, and moderate scales."""
    fmt = FORMATS[name]
    codes = torch.randint(256, (*shape[:-1], fmt.packed_columns(shape[-1])), dtype=torch.uint8, device="cuda")
    if fmt.element.bits == 8 and fmt.element.exponent_bits:
        codes &= 0xBF
    size = (*shape[:-2], *fmt.scale_shape(*shape[-2:]))
    if fmt.scale == "f32":
        scales = torch.rand(size, device="cuda") / 100 + 1e-3
    else:
        low, high = (118, 122) if fmt.scale == "e8m0" else (30, 60)
        scales = torch.randint(low, high, size, dtype=torch.uint8, device="cuda")
    outer = torch.rand(*shape[:-2], 1, device="cuda") if fmt.tensor_scale else None
    return backend.pack(QuantTensor(fmt, shape, codes, scales, outer, fmt.rules[0]))


def random_routes(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Ids and weights of [tokens, top_k]: uniform over experts."""
    values, ids = torch.randn(tokens, experts, device="cuda").topk(top_k)
    return ids, values.softmax(-1)


@dataclass(frozen=True)
class MoeCell:
    """Calls of one layer's experts.

    Attributes:
        given: x, ids, routing weights, w13, w2 and activation of each call, with other routes each time.
        biases: b13 and b2.
        read, operations: bytes that must be read and operations that must be done, in a call.
    """

    given: list[tuple[Any, ...]]
    biases: tuple[Tensor | None, Tensor | None]
    read: float
    operations: float


def moe_layers(model: Experts, name: str, count: int) -> list[tuple[Weights, Weights]]:
    """w13 and w2 of `count` layers in a format."""
    rows = model.activation.rows(model.inner)
    return [
        (
            random_weights(name, model.experts, rows, model.hidden),
            random_weights(name, model.experts, model.hidden, model.inner),
        )
        for _ in range(count)
    ]


def moe_cell(model: Experts, layers: list[tuple[Weights, Weights]], tokens: int) -> MoeCell:
    """Calls for `tokens` tokens, the layers taking turns."""
    e, hidden, inner, act = model.experts, model.hidden, model.inner, model.activation
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    calls = 10 if tokens <= 32 else 4 if tokens <= 512 else 2
    routes = [random_routes(tokens, e, model.top_k) for _ in range(calls)]
    hit = sum(len(ids.unique()) for ids, _ in routes) / calls
    bits = layers[0][0].format.bits_per_weight
    b13 = torch.randn(e, act.rows(inner), device="cuda").bfloat16() if model.bias else None
    b2 = torch.randn(e, hidden, device="cuda").bfloat16() if model.bias else None
    return MoeCell(
        [(x, *r, *layers[i % len(layers)], act) for i, r in enumerate(routes)],
        (b13, b2),
        hit * 3 * inner * hidden * bits / 8 + 4 * tokens * hidden,
        6.0 * tokens * model.top_k * inner * hidden,
    )


def floor(read: float, operations: float, peaks: tuple[float, float]) -> float:
    """Microseconds that no kernel beats: reading at the first peak, operating at the second."""
    return max(read / peaks[0] / 1e3, operations / peaks[1] / 1e6)
