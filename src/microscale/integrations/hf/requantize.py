"""`microscale.requantize`: the weights of a loaded transformers model in another format, and back to dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from microscale.errors import CheckpointError, FormatError
from microscale.formats import Format, activation_format, get_format
from microscale.integrations.hf.experts import activation_of, attach, hold
from microscale.integrations.hf.options import Options
from microscale.integrations.hf.quantizer import activation_dtype, top_k_of
from microscale.integrations.hf.survey import GROUPS, Report, matrices, packable, row, weights_of
from microscale.layer_classes import ROUTER_NAMES
from microscale.nn import QuantLinear
from microscale.oracle import check_forced
from microscale.quant import QuantTensor, dequantize, quantize

Progress = Callable[[Iterable[Any]], Iterable[Any]]


def requantize(
    model: Any,
    fmt: str | Format,
    *,
    what: Sequence[str] = GROUPS,
    ignore: Sequence[str] = (),
    rule: str | None = None,
    act: str = "a16",
    backend: str | None = None,
    canary: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Store weights of a loaded model in a format, in place; dense and already packed ones alike.

    A module at a time: beside the model, memory is one module's packed weights and one matrix in float32.

    Args:
        model: a transformers model; experts behind its experts interface, linears that are plain nn.Linear.
        fmt: a format or its name.
        what: "experts", "linear", and patterns of module paths. "linear" leaves out what shares its weight with
            another module (a tied lm_head) and routers; a pattern does not.
        ignore: patterns of modules to leave as they are. A pattern (`*`, `?`, `[]`) stands for a module's whole
            path, its end, or either of a parent: "model.layers.0", "self_attn", "lm_head".
        rule: the scale rule, by default the format's first.
        act, backend, canary: as in `load`, for the layers that change.
        progress: wraps the iterable of modules to change.
    Returns:
        What changed, with the SQNR against the numbers that the model had.
    Raises:
        FormatError: unknown format or rule, or K is no multiple of the format's block.
        CheckpointError: nothing to quantise, a pattern that matches nothing, an activation that is not known.
        NoBackendError: every backend refused a layer, or the forced one did; earlier layers are then converted.
    """
    fmt = get_format(fmt)
    if rule is not None and rule not in fmt.rules:
        raise FormatError(f"unknown scale rule {rule!r} for {fmt.name}; known: {', '.join(fmt.rules)}")
    activation_format(fmt.name, act)
    chosen = _choose(model, what, ignore)
    for name, module, group in chosen:
        for w in weights_of(module).values():
            _check_divides(name, w.shape, fmt)
        if group == "experts":
            activation_of(module)

    placer = Options(backend, act, canary).placer()
    check_forced(type(model).__name__, placer.backends, placer.force)
    dtype = activation_dtype(model)
    rows = []
    with torch.no_grad():
        for name, module, group in progress(chosen) if progress else chosen:
            before = weights_of(module)
            after = {key: _quantize(w, fmt, rule) for key, w in before.items()}
            rows.append(row(name, group, before, dict(after)))
            del before
            if group == "experts":
                # Ahead of what changes: an error or an interrupt may leave it at that.
                _forbid_saving(model, fmt)
                hold(module, after)
                attach(module, top_k_of(model.config), placer, act).place(dtype)
            else:
                linear = QuantLinear(after["weight"], _bias(module), placer, act).train(module.training)
                linear.place(dtype)
                _forbid_saving(model, fmt)
                _replace(model, module, linear)
    return Report(tuple(rows))


def dequantize_model(model: Any) -> Any:
    """Give every packed layer dense weights in the model's dtype, each number rounded once; returns the model."""
    dtype = model.dtype
    with torch.no_grad():
        for _, module, group in list(packable(model)):
            held = {key: w for key, w in weights_of(module).items() if isinstance(w, QuantTensor)}
            if not held:
                continue
            if group == "linear":
                n, k = held["weight"].shape
                bias = _bias(module)
                linear = nn.Linear(k, n, bias is not None, device="meta", dtype=dtype)
                linear.weight = nn.Parameter(dequantize(held["weight"], dtype))
                linear.register_parameter("bias", None if bias is None else nn.Parameter(bias))
                _replace(model, module, linear.train(module.training))
                continue
            for key, w in held.items():
                dense = _dense(w, dtype, bool(module.is_transposed))
                _drop(module, key)
                module.register_parameter(key, nn.Parameter(dense))
            del module.microscale
            config: Any = module.config
            config._experts_implementation_internal = model.get_correct_experts_implementation(None)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


# What listens to a module's calls.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another wherever that is, with its hooks: their handles go on to remove them."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _choose(model: nn.Module, what: Sequence[str], ignore: Sequence[str]) -> list[tuple[str, nn.Module, str]]:
    host = type(model).__name__
    if not (isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "dtype")):
        raise CheckpointError(host, "is no transformers model, which is what requantize takes")
    if isinstance(what, str) or isinstance(ignore, str):
        raise CheckpointError(host, "what and ignore are sequences of strings, not one string")
    patterns = [word for word in what if word not in GROUPS]
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                owners[id(p)] = owners.get(id(p), 0) + 1
    chosen = []
    for name, module, group in packable(model):
        shared = isinstance(module, nn.Linear) and owners[id(module.weight)] > 1
        special = group == "linear" and (shared or not ROUTER_NAMES.isdisjoint(name.split(".")))
        wanted = any(matches(name, p) for p in patterns) or (group in what and not special)
        if wanted and not any(matches(name, p) for p in ignore):
            chosen.append((name, module, group))
    names = [name for name, _ in model.named_modules() if name]
    convertible = [name for name, _, _ in packable(model)]
    for pattern, among in [*((p, convertible) for p in patterns), *((p, names) for p in ignore)]:
        if not any(matches(name, pattern) for name in among):
            kind = "experts or nn.Linear" if among is convertible else "module"
            raise CheckpointError(host, f"{pattern!r} matches no {kind}")
    if not chosen:
        raise CheckpointError(host, f"nothing to quantise: no module is {' or '.join(what) or 'selected'}")
    return chosen


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern stands for a module's path, its end, or either of a parent."""
    parts = name.split(".")
    return any(
        fnmatchcase(".".join(parts[start:end]), pattern)
        for end in range(1, len(parts) + 1)
        for start in range(end)
    )


def _check_divides(name: str, shape: tuple[int, ...], fmt: Format) -> None:
    """Ragged blocks are defined for block FP8 alone (DeepSeek's own shapes have them)."""
    if fmt.block[0] == 1 and shape[-1] % fmt.block[1]:
        raise FormatError(
            f"{name}: {fmt.name} stores blocks of {fmt.block[1]} along K, and K = {shape[-1]} is no multiple; "
            f"ignore=[{name!r}] leaves it as it is"
        )


def _quantize(w: Tensor | QuantTensor, fmt: Format, rule: str | None) -> QuantTensor:
    """An expert at a time, each into its place: parts that are put together afterwards would be there twice."""
    if len(w.shape) == 2:
        return quantize(next(matrices(w)), fmt, rule=rule)
    whole: QuantTensor | None = None
    for e, matrix in enumerate(matrices(w)):
        part = quantize(matrix, fmt, rule=rule)
        if whole is None:
            whole = _room_for(part, w.shape[0])
        whole.codes[e], whole.scales[e] = part.codes, part.scales
        if whole.tensor_scale is not None and part.tensor_scale is not None:
            whole.tensor_scale[e] = part.tensor_scale
    assert whole is not None
    return whole


def _room_for(part: QuantTensor, experts: int) -> QuantTensor:
    def stack(t: Tensor) -> Tensor:
        return t.new_empty((experts, *t.shape))

    outer = None if part.tensor_scale is None else stack(part.tensor_scale)
    return replace(
        part,
        shape=(experts, *part.shape),
        codes=stack(part.codes),
        scales=stack(part.scales),
        tensor_scale=outer,
    )


def _dense(w: QuantTensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """[E, N, K], or [E, K, N] where the class stores it so."""
    e, n, k = w.shape
    out = torch.empty((e, k, n) if transposed else (e, n, k), dtype=dtype, device=w.device)
    for i in range(e):
        out[i] = dequantize(w[i], dtype).T if transposed else dequantize(w[i], dtype)
    return out


def _drop(module: nn.Module, key: str) -> None:
    """Forget the packed forms of a weight, as loaded or as held."""
    for suffix in ("_blocks", "_codes", "_scales", "_tensor_scale"):
        module._parameters.pop(key + suffix, None)
        module._buffers.pop(key + suffix, None)


def _bias(module: Any) -> Tensor | None:
    return None if module.bias is None else module.bias.detach()


class _NotSerializable(HfQuantizer):
    """Makes `save_pretrained` refuse: it would write packed parts under names that no loader reads."""

    def __init__(self, fmt: Format) -> None:
        self.quantization_config: Any = SimpleNamespace(quant_method=f"microscale {fmt.name}")  # its message
        self.pre_quantized = True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """No."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No."""
        return False


def _forbid_saving(model: Any, fmt: Format) -> None:
    model.hf_quantizer = _NotSerializable(fmt)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
