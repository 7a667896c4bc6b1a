"""What the operands of `linear` and `moe` must be, checked once for the reference and for every backend."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from microscale.activations import Activation
from microscale.backends import autograd
from microscale.errors import BackendError
from microscale.formats import Format
from microscale.quant import dequantize, quantize

_FEW = 64  # numbers that Python compares sooner than an operator of torch is called


def check_linear(x: Tensor, shape: tuple[int, ...], bias: Tensor | None) -> None:
    """x [..., K] and bias [N] against a weight of `shape` [N, K].

    Raises:
        BackendError: they disagree; the message has both values.
    """
    if len(shape) != 2:
        raise BackendError(f"w: expected [N, K], found {shape}")
    _check_floating("x", x)
    _check_shape("x", x, (*x.shape[:-1], shape[1]))
    _check_bias("bias", bias, shape[:1])


def check_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: tuple[int, ...],
    w2: tuple[int, ...],
    activation: Activation,
    b13: Tensor | None,
    b2: Tensor | None,
    weight_on_input: bool,
) -> None:
    """x [M, H], ids and weights [M, T] and biases against weights of shapes w13 [E, rows, H] and w2 [E, N, I].

    Raises:
        BackendError: they disagree; the message has both values.
    """
    if len(w13) != 3 or len(w2) != 3:
        raise BackendError(f"expected w13 [E, rows, H] and w2 [E, N, I], found {w13} and {w2}")
    experts, rows, hidden = w13
    if w2[0] != experts:
        raise BackendError(f"w13 has {experts} experts, w2 has {w2[0]}")
    if rows != activation.rows(w2[2]):
        raise BackendError(f"w13 has {rows} rows; w2 with I = {w2[2]} needs {activation.rows(w2[2])}")
    if x.dim() != 2:
        raise BackendError(f"x: expected [M, H], found {tuple(x.shape)}")
    _check_floating("x", x)
    _check_shape("x", x, (x.shape[0], hidden))
    if topk_ids.dim() != 2:
        raise BackendError(f"topk_ids: expected [M, T], found {tuple(topk_ids.shape)}")
    _check_shape("topk_ids", topk_ids, (x.shape[0], topk_ids.shape[1]))
    _check_floating("topk_weights", topk_weights)
    _check_shape("topk_weights", topk_weights, tuple(topk_ids.shape))
    _check_bias("b13", b13, (experts, rows))
    _check_bias("b2", b2, w2[:2])
    if weight_on_input and topk_ids.shape[1] != 1:
        raise BackendError(f"weight_on_input needs T = 1, found T = {topk_ids.shape[1]}")


def local_ids(topk_ids: Tensor, expert_map: Tensor | None, experts: int) -> Tensor:
    """Global ids [M, T] -> int64 indices into the local experts, -1 where there is nothing to add.

    Raises:
        BackendError: an id or an entry of the map is out of range. Finding out waits for the device.
    """
    ids = _integers("topk_ids", topk_ids)
    known = experts if expert_map is None else expert_map.numel()
    where = f"E = {experts}" if expert_map is None else f"expert_map has {known} entries, E = {experts}"
    _check_range("expert id", ids, known, where)
    if expert_map is None:
        return ids
    if expert_map.dim() != 1:
        raise BackendError(f"expert_map: expected [E_global], found {tuple(expert_map.shape)}")
    table = _integers("expert_map", expert_map)
    _check_range("expert_map entry", table, experts, f"E = {experts}")
    return torch.cat((table, table.new_full((1,), -1)))[ids]  # id -1 reads the appended -1


def stored(x: Tensor, act: Format | None, dtype: torch.dtype) -> Tensor:
    """x [..., K] in `dtype`, as it reads back from the activations' format; None: unchanged but for the dtype.

    Its gradient is that of x as it is (straight through): rounding has none of use.

    Raises:
        BackendError: `act` shares scales between rows.
    """
    if act is None:
        return x.to(dtype)
    if act.block[0] != 1:
        raise BackendError(f"act: {act.name} shares a scale between {act.block[0]} rows; activations need 1")
    # A row as a matrix of its own: a tensor scale is then that row's, and never sees another token.
    y = dequantize(quantize(x.detach()[..., None, :], act), dtype).squeeze(-2)
    if not autograd.wanted(x) and (torch.compiler.is_compiling() or autograd.plain(x)):
        return y
    return y + (x - x.detach()).to(dtype)  # + 0, and NaN only where y is


def stored_apart(x: Tensor, act: Format, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `stored`, for NVFP4 and without gradients: numbers without their rows' multipliers, and these, float32 [...].

    bfloat16 holds the numbers, which have six significant bits.
    """
    q = quantize(x.detach()[..., None, :], act)
    assert q.tensor_scale is not None
    y = dequantize(replace(q, tensor_scale=torch.ones_like(q.tensor_scale)), dtype)
    return y.squeeze(-2), q.tensor_scale.squeeze(-1)


def _integers(what: str, t: Tensor) -> Tensor:
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise BackendError(f"{what}: expected integers, found {t.dtype}")
    return t.to(torch.int64)


def _check_range(what: str, values: Tensor, bound: int, where: str) -> None:
    if values.numel() == 0:
        return
    if values.numel() <= _FEW and values.is_cpu and not torch.compiler.is_compiling():
        listed = values.flatten().tolist()
        least, greatest = min(listed), max(listed)
    else:
        least, greatest = (int(v) for v in values.aminmax())
    if least < -1 or greatest >= bound:
        bad = least if least < -1 else greatest
        raise BackendError(f"{what} {bad} is not in [-1, {bound}) ({where})")


def _check_floating(what: str, t: Tensor) -> None:
    if not t.is_floating_point():
        raise BackendError(f"{what}: expected floating point, found {t.dtype}")


def _check_bias(what: str, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if bias is not None:
        _check_floating(what, bias)
        _check_shape(what, bias, shape)


def _check_shape(what: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != shape:
        raise BackendError(f"{what}: expected {shape}, found {tuple(t.shape)}")
