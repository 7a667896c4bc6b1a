"""Calls into the C++ core: tensors to addresses, operands to what the C ABI takes. `cpu` has checked them before."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from microscale import _core, env
from microscale.activations import KINDS, Activation
from microscale.errors import SettingError
from microscale.fork import survive_forks
from microscale.formats import FORMATS, FP8_GROUP128, Format
from microscale.operands import local_ids

FORMAT_IDS = {name: i for i, name in enumerate(FORMATS)}  # enum ms_format
DTYPE_IDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # enum ms_dtype
# Formats of activations that the core rounds to; of weights the last one shares scales between rows, too.
STORED_IDS = {name: i for name, i in FORMAT_IDS.items() if FORMATS[name].block[0] == 1}
STORED_IDS[FP8_GROUP128.name] = FORMAT_IDS["fp8_block128"]
ALIGNMENT = 64  # bytes, of a packed buffer
CALLS = ("linear", "moe", "dense", "attend", "rms_norm", "route", "stored")
STEPS = ("embed", "rms_norm", "dense", "linear", "attend", "gate", "route", "moe")  # enum ms_step_kind
ROUTERS = ("topk_softmax", "softmax_topk")  # enum ms_router, functions of `microscale.routing`
KIND_IDS = {kind: i for i, kind in enumerate(KINDS)}  # enum ms_kind
_CPU = torch.device("cpu")  # wherever tensors are made by default
_run: Any = _core  # through which these are called; see `timed`

survive_forks()  # operands are converted by PyTorch's operators


@cache
def _widest() -> int:
    return _core.level()


def level() -> int:
    """The level that calls use now: the widest there is, or the one that MICROSCALE_CPU_LEVEL lowers it to.

    Raises:
        SettingError: no such level, or one that this machine or this build does not have.
    """
    word = env.cpu_level()
    if word is None:
        return _widest()
    index = env.CPU_LEVELS.index(word)
    if index > _widest():
        found, compiled = env.CPU_LEVELS[_widest()], env.CPU_LEVELS[_core.compiled_level()]
        raise SettingError(
            f"MICROSCALE_CPU_LEVEL={word}, and the widest level here is {found}; the core was compiled up to {compiled}"
        )
    return index


class _Stopwatch:
    """The core, its calls timed."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        call = getattr(_core, name)
        if name not in CALLS:
            return call

        def timed_call(*args: Any) -> None:
            started = time.perf_counter()
            call(*args)
            self.add(name, time.perf_counter() - started)

        self.__dict__[name] = timed_call
        return timed_call

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that somebody else has seen."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """For a while, add the seconds that each of `CALLS` and `STEPS` takes inside the core to `seconds`, by its name."""
    global _run
    before = _run
    _run = _Stopwatch(seconds)
    try:
        yield
    finally:
        _run = before


def pack(format: str, shape: tuple[int, int, int], codes: Tensor, scales: Tensor) -> Tensor:
    """Contiguous canonical codes and scales of [E, N, K] to uint8 [bytes], aligned; empty where the shape is."""
    if 0 in shape:
        return torch.zeros(0, dtype=torch.uint8, device=_CPU)
    size = _core.packed_bytes(FORMAT_IDS[format], *shape)
    room = torch.empty(size + ALIGNMENT - 1, dtype=torch.uint8, device=_CPU)
    start = -room.data_ptr() % ALIGNMENT
    packed = room[start : start + size]
    args = (codes.data_ptr(), scales.data_ptr(), packed.data_ptr(), torch.get_num_threads())
    _core.pack(FORMAT_IDS[format], *shape, *args)
    return packed


def unpack(packed: Tensor, codes: Tensor, scales: Tensor) -> None:
    """The inverse of `pack`, into contiguous codes and scales."""
    if packed.numel():
        args = (codes.data_ptr(), scales.data_ptr(), torch.get_num_threads())
        _core.unpack(packed.data_ptr(), packed.numel(), *args)


def linear(
    x: Tensor,
    packed: Tensor,
    outer: Tensor | None,
    n: int,
    bias: Tensor | None,
    x_outer: Tensor | None = None,
) -> Tensor:
    """[..., K] -> [..., N]; see `ms_linear`. `x_outer`: float32 [...], contiguous."""
    k = x.shape[-1]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=_CPU)
    m = y.numel() // n if n else 0
    if m == 0:
        return y
    if k == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(y.shape))
    rows, stride = _rows(x, k)
    b = float32(bias)
    _run.linear(
        level(),
        packed.data_ptr(),
        _address(outer),
        DTYPE_IDS[x.dtype],
        rows.data_ptr(),
        stride,
        _address(x_outer),
        m,
        _address(b),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def dense(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] -> [..., N] with w [N, K] and bias [N] of one dtype, rows of w contiguous; see `ms_dense`."""
    n, k = w.shape
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=_CPU)
    m = y.numel() // n if n else 0
    if m == 0:
        return y
    rows, stride = (x, k) if x.is_contiguous() else _rows(x, k)
    b = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    _run.dense(
        level(),
        DTYPE_IDS[w.dtype],
        w.data_ptr(),
        w.stride(0),
        n,
        k,
        _address(b),
        DTYPE_IDS[x.dtype],
        rows.data_ptr(),
        stride,
        m,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def stored(x: Tensor, act: Format, dtype: torch.dtype, outer: Tensor | None = None) -> Tensor:
    """x [..., K] in `dtype` as it reads back from one of `STORED_IDS`; see `ms_stored`.

    Args:
        outer: float32 [...], contiguous: where rows' multipliers go, instead of into the result (NVFP4 alone).

    The slow twins are `operands.stored` and `operands.stored_apart`.
    """
    k = x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=_CPU)
    if y.numel() == 0:
        return y
    rows, stride = _rows(x, k)
    types = DTYPE_IDS[x.dtype], DTYPE_IDS[dtype]
    size = rows.data_ptr(), stride, y.numel() // k, k
    out = types[1], y.data_ptr(), _address(outer)
    _run.stored(level(), STORED_IDS[act.name], types[0], *size, *out, torch.get_num_threads())
    return y


def rms_norm(x: Tensor, w: Tensor, epsilon: float) -> Tensor:
    """x [..., N], contiguous, over the root of its mean square, times w [N]; see `ms_rms_norm`."""
    y, n = torch.empty_like(x), x.shape[-1]
    types = DTYPE_IDS[x.dtype], DTYPE_IDS[w.dtype]
    _run.rms_norm(
        level(), types[0], x.data_ptr(), x.numel() // n, n, types[1], w.data_ptr(), epsilon, y.data_ptr()
    )
    return y


def route(
    logits: Tensor,
    top_k: int,
    router: str = "topk_softmax",
    renormalize: bool = True,
    rounded: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Contiguous logits [M, E] -> weights float32 [M, T], and ids; see `ms_route`.

    Args:
        rounded: the dtype that weights are rounded to; None: the logits'.

    The slow twins are `routing.topk_softmax` and `routing.softmax_topk`.
    """
    m, experts = logits.shape
    ids = torch.empty((m, top_k), dtype=torch.int64, device=_CPU)
    weights = torch.empty((m, top_k), dtype=torch.float32, device=_CPU)
    kind, dtype = ROUTERS.index(router), DTYPE_IDS[logits.dtype]
    how = (kind, renormalize, DTYPE_IDS[rounded or logits.dtype])
    out = (ids.data_ptr(), weights.data_ptr())
    _run.route(level(), dtype, logits.data_ptr(), m, experts, *how, top_k, *out)
    return weights, ids


def run(chain: Any, position: int) -> None:
    """Take a `_core.Chain`, whose steps write where they were told to, through the token at a position."""
    took = chain.run(level(), position, torch.get_num_threads())
    if isinstance(_run, _Stopwatch):
        for name, seconds in zip(STEPS, took, strict=True):
            _run.add(name, seconds)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float
) -> Tensor:
    """Softmax attention of few queries -> [B, Q, heads, D].

    Args:
        q: [B, heads, Q, D].
        k, v: [B, key heads, T, D]; as in q, each head's numbers are contiguous.
        mask: bool [B or 1, 1, Q, T], True: looked at.
        sinks: [heads], contiguous; see `ms_attend`.
    """
    b, heads, queries, width = q.shape
    _, key_heads, tokens, value_width = v.shape
    y = torch.empty((b, queries, heads, value_width), dtype=q.dtype, device=_CPU)
    skip = (0, 0)
    if mask is not None:
        skip = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2))
    _run.attend(
        level(),
        DTYPE_IDS[q.dtype],
        scale,
        (b, heads, key_heads, queries, tokens, width, value_width),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *skip),
        _address(mask),
        _address(sinks),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    packed13: Tensor,
    outer13: Tensor | None,
    packed2: Tensor,
    outer2: Tensor | None,
    experts: int,
    n: int,
    activation: Activation,
    b13: Tensor | None,
    b2: Tensor | None,
    expert_map: Tensor | None,
    weight_on_input: bool,
    stored: str = "",
    x_outer: Tensor | None = None,
) -> Tensor:
    """[M, H] -> [M, N]; see `ms_moe`. No dimension of the weights is 0.

    `stored`: one of `STORED_IDS`, of the intermediate; FP8 only with float32 x. `x_outer`: float32 [M], contiguous.
    """
    ids = local_ids(topk_ids, expert_map, experts).contiguous()
    m, t = ids.shape
    y = torch.empty((m, n), dtype=x.dtype, device=_CPU)
    if m == 0:
        return y
    if t == 0:
        return y.zero_()
    # Names for what is converted: an address does not keep a temporary alive.
    rows, weights = x.contiguous(), topk_weights.float().contiguous()
    first, second = float32(b13), float32(b2)
    _run.moe(
        level(),
        packed13.data_ptr(),
        _address(outer13),
        packed2.data_ptr(),
        _address(outer2),
        DTYPE_IDS[x.dtype],
        rows.data_ptr(),
        _address(x_outer),
        m,
        ids.data_ptr(),
        weights.data_ptr(),
        t,
        KIND_IDS[activation.kind],
        activation.gated,
        activation.interleaved,
        activation.alpha,
        activation.beta,
        math.inf if activation.limit is None else activation.limit,
        1 + STORED_IDS[stored] if stored else 0,
        _address(first),
        _address(second),
        weight_on_input,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _rows(x: Tensor, k: int) -> tuple[Tensor, int]:
    """x as [M, K] with contiguous rows, and elements from one to the next; copies only what the core cannot read."""
    rows = x if x.dim() == 2 else x.reshape(-1, k)
    down, along = rows.stride()
    if (along == 1 or k == 1) and (down >= k or rows.shape[0] == 1):
        return rows, max(down, k)
    return rows.contiguous(), k


def float32(t: Tensor | None) -> Tensor | None:
    """As the core wants biases: contiguous, a copy if need be."""
    if t is None or (t.dtype == torch.float32 and t.is_contiguous()):
        return t
    return t.float().contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
