"""humming-kernels for `gpu_kernels.py`: its experts in both of its ways, and its linears, with its own heuristics.

`indexed` reads each expert's tokens through an index, `grouped` sorts them first. What they need to know of the routes
is worked out before the clock starts, which ours is not. Not batch-invariant: that is its fastest, and what it does
unless it is asked. Biases are its own. The package has an activation of two arguments in C++, given here, and no sum
over experts: a kernel of ours does that.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from microscale.activations import Activation
from microscale.backends.adapters.humming import PAD_K, PAD_N
from microscale.quant import QuantTensor

# In the package's words. Sorting pays from some hundred tokens on, so either way is timed only where it may win.
WAYS = {"indexed": "indexed", "grouped": "grouped_contiguous"}
_SORTED_FROM, _INDEXED_UP_TO = 512, 512  # tokens


def refuse(name: str) -> str | None:
    """None, or why weights in a format cannot be timed here."""
    if importlib.util.find_spec("humming") is None:
        return "the package humming-kernels is not installed"
    if name != "mxfp4":
        return f"it is timed with mxfp4, not with {name}"
    return None


def version() -> str:
    """Of the package."""
    return importlib.metadata.version("humming-kernels")


def pack(w: QuantTensor, bias: Tensor | None = None) -> tuple[Any, dict[str, Tensor]]:
    """(layer config, tensors) of [N, K] or [E, N, K] weights, padded as vLLM pads them."""
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_and_transform_humming_tensors

    *lead, n, k = w.shape
    tensors = {"weight": w.codes.view(torch.int32), "weight_scale": w.scales.view(torch.float8_e8m0fnu)}
    if bias is not None:
        tensors["bias"] = bias
    schema = HummingWeightSchema(
        b_dtype="float4e2m1", bs_dtype="float8e8m0", weight_scale_group_size=w.format.block[1]
    )
    config, found = prepare_and_transform_humming_tensors(
        tensors,
        n,
        k,
        schema,
        num_experts=lead[0] if lead else None,
        pad_n_to_multiple=PAD_N,
        pad_k_to_multiple=PAD_K,
        has_bias=bias is not None,
        torch_dtype=torch.bfloat16,
        device=w.device,
    )
    return config, found | {"locks": _locks(w.device)}


@cache
def _locks(device: torch.device) -> Tensor:
    """What its programs wait at for each other; zeros before and after every call."""
    return torch.zeros(2048, dtype=torch.int32, device=device)


def ways(tokens: int) -> list[str]:
    """Those of `WAYS` that are timed with so many tokens."""
    found = ["indexed"] if tokens <= _INDEXED_UP_TO else []
    return [*found, "grouped"] if tokens >= _SORTED_FROM else found


def compile_for(weights: list[tuple[Any, dict[str, Tensor]]], cells: list[tuple[str, int]]) -> None:
    """Its kernels for (kind of product, rows), side by side: one takes the compiler ten seconds."""
    from humming.kernel.humming import HummingKernel

    def one(job: tuple[Any, str, int]) -> None:
        config, kind, rows = job
        how = _how(config, kind, rows)
        HummingKernel.prepare_kernels(config.to_str(), *(json.dumps(part) for part in how.values()))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, [(config, *cell) for config, _ in weights for cell in cells]))


def _how(config: Any, kind: str, rows: int) -> dict[str, Any]:
    from humming.tune import get_heuristics_config

    tuned = get_heuristics_config(config, shape_m=rows, gemm_type=kind)
    return {"compute_config": {"gemm_type": kind}, "tuning_config": tuned}


def linear(x: Tensor, w: tuple[Any, dict[str, Tensor]]) -> Tensor:
    """[M, K] -> [M, N]."""
    from humming.forward import humming_forward

    y: Tensor = humming_forward(w[0], inputs=x, **w[1], **_how(w[0], "dense", x.shape[0]))
    return y


def experts(
    way: str,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: tuple[Any, dict[str, Tensor]],
    w2: tuple[Any, dict[str, Tensor]],
    activation: Activation,
) -> Callable[[], Tensor]:
    """A call of one layer's experts, [M, H] -> [M, H], for these routes."""
    if way == "indexed":
        return partial(_indexed, x, weights, w13, w2, _activation(activation), *_blocks(ids, w13[0], w2[0]))
    order = ids.flatten().argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=x.device)
    counts = ids.flatten().bincount(minlength=w13[0].num_experts)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    place = place.view(ids.shape).int()
    return partial(_grouped, x, weights, w13, w2, _activation(activation), place, offsets)


def _indexed(
    x: Tensor, weights: Tensor, w13: Any, w2: Any, activation: dict[str, str], first: Any, second: Any
) -> Tensor:
    from humming.forward import humming_forward, may_process_input

    compute = {"gemm_type": "indexed"}
    h = humming_forward(w13[0], inputs=x, **w13[1], **first, top_k=weights.shape[1], compute_config=compute)
    h, _, _ = may_process_input(w2[0], h, **activation)
    y = humming_forward(w2[0], inputs=h, **w2[1], **second, top_k=1, compute_config=compute)
    return _combine(y, weights, None)


def _grouped(
    x: Tensor, weights: Tensor, w13: Any, w2: Any, activation: dict[str, str], place: Tensor, offsets: Tensor
) -> Tensor:
    from humming.forward import humming_forward, may_process_input

    how = [_how(w[0], "grouped_contiguous", weights.numel()) for w in (w13, w2)]
    rows = torch.empty(place.numel(), x.shape[1], dtype=x.dtype, device=x.device)
    rows, _, _ = may_process_input(w13[0], x, outputs=rows, layout="scatter", scatter_idx=place)
    h = humming_forward(w13[0], inputs=rows, **w13[1], **how[0], expert_layout=offsets)
    h, _, _ = may_process_input(w2[0], h, **activation)
    y = humming_forward(w2[0], inputs=h, **w2[1], **how[1], expert_layout=offsets)
    return _combine(y, weights, place)


def _activation(a: Activation) -> dict[str, str]:
    """As the package wants it: an expression of the gate `a` and the other half `b`."""
    kind = "binary_interleaved" if a.interleaved else "binary_split"
    gate, up = "a", "b"
    if a.limit is not None:
        gate, up = f"fminf(a, {a.limit}f)", f"fminf(fmaxf(b, {-a.limit}f), {a.limit}f)"
    if a.kind == "silu":
        text = f"{gate} / (1.0f + __expf(-{gate})) * {up}"
    else:
        text = f"{gate} / (1.0f + __expf(-{float(a.alpha)}f * {gate})) * ({up} + {float(a.beta)}f)"
    return {"activation_type": kind, "activation_impl": text}


def _blocks(ids: Tensor, *configs: Any) -> list[dict[str, Tensor]]:
    """Each product's routes by expert, in blocks of as many as its kernel for this many takes."""
    from humming.testing.data import generate_moe_tensors

    found = []
    for config in configs:
        size = _how(config, "indexed", ids.numel())["tuning_config"]["block_shape"][0]
        made = generate_moe_tensors(ids.int(), config.num_experts, "indexed", block_size_config=size)
        found.append(dict(zip(("sorted_ids", "expert_ids", "num_tokens_padded"), made[2:], strict=True)))
    return found


@triton.jit
def _combine_kernel(
    y, shares, weights, place, N, INDEXED: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(N, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for t in tl.static_range(TOP_K):
        route = token * TOP_K + t
        row = tl.load(place + route).to(tl.int64) if INDEXED else route
        weight = tl.load(weights + route).to(tl.float32)
        acc += weight * tl.load(shares + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + token * N + n, acc.to(y.dtype.element_ty), mask=n < N)


def _combine(shares: Tensor, weights: Tensor, place: Tensor | None) -> Tensor:
    (tokens, top_k), n = weights.shape, shares.shape[1]
    y = torch.empty(tokens, n, dtype=shares.dtype, device=shares.device)
    _combine_kernel[(tokens * -(-n // 1024),)](
        y, shares, weights, place, n, INDEXED=place is not None, TOP_K=top_k, BLOCK=1024
    )
    return y
