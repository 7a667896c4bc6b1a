"""transformers' experts modules with packed parameters: the class stays, its weight parameters are replaced.

Keeping the class keeps the router, parameter paths, expert parallelism and PEFT names as they are. What changes is
which parameters it has, and which function transformers' experts interface dispatches its forward to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from microscale.activations import Activation
from microscale.canary import Placer
from microscale.errors import CheckpointError
from microscale.experts_host import ExpertsHost
from microscale.formats import FORMATS, Format
from microscale.quant import QuantTensor
from microscale.quant_experts import QuantExperts
from microscale.reference import activate

NAME = "microscale"  # the word for transformers' `experts_implementation`


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of `model` that hold stacked experts behind transformers' experts interface."""
    for name, module in model.named_modules():
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed"):
            yield name, module


def swap_parameters(module: nn.Module, fmt: Format) -> None:
    """Replace an experts module's dense parameters by packed ones under the gpt-oss names, on the meta device.

    `gate_up_proj` [E, H, 2I] becomes `gate_up_proj_blocks` uint8 [E, 2I, H/32, 16] and `gate_up_proj_scales` uint8
    [E, 2I, H/32]; `down_proj` likewise. Biases stay.
    """
    for name, (e, n, k) in _dense_shapes(module).items():
        del module._parameters[name]
        groups = k // fmt.block[1]
        shapes = {"_blocks": (e, n, groups, fmt.packed_columns(fmt.block[1])), "_scales": (e, n, groups)}
        for suffix, shape in shapes.items():
            empty = torch.empty(shape, dtype=torch.uint8, device="meta")
            module.register_parameter(name + suffix, nn.Parameter(empty, requires_grad=False))
    _take_over(module)


def hold(module: nn.Module, weights: dict[str, QuantTensor]) -> None:
    """Replace an experts module's weights (dense or packed) by these, in any format, as buffers.

    Args:
        weights: "gate_up_proj" (or "up_proj") [E, rows, H] and "down_proj" [E, H, I].
    """
    for name, w in weights.items():
        for suffix in ("", "_blocks", "_scales"):
            module._parameters.pop(name + suffix, None)
        for suffix, part in (("_codes", w.codes), ("_scales", w.scales), ("_tensor_scale", w.tensor_scale)):
            module._buffers.pop(name + suffix, None)
            module.register_buffer(name + suffix, None if part is None else _as_bits(part))
    object.__setattr__(
        module, "microscale_formats", {name: (w.format, w.shape) for name, w in weights.items()}
    )
    _take_over(module)


def read(module: nn.Module) -> tuple[QuantTensor, QuantTensor]:
    """The weights that a swapped module stores, as views."""
    return _quant_tensor(module, _first(module)), _quant_tensor(module, "down_proj")


def biases(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Those of a module's two products, None where there is none."""
    return getattr(module, f"{_first(module)}_bias", None), getattr(module, "down_proj_bias", None)


def parts(module: nn.Module, w13: QuantTensor, w2: QuantTensor) -> dict[str, Tensor]:
    """The tensors, by name, as which a swapped module stores these weights."""
    found = {}
    for name, w in ((_first(module), w13), ("down_proj", w2)):
        if hasattr(module, f"{name}_blocks"):
            found[f"{name}_blocks"] = w.codes.view(*w.scales.shape, -1)
        else:
            found[f"{name}_codes"] = w.codes
        found[f"{name}_scales"] = _as_bits(w.scales)
    return found


HOST = ExpertsHost(read, biases, parts)


def attach(module: nn.Module, top_k: int, placer: Placer, act: str) -> QuantExperts:
    """Give a swapped and loaded module the object that runs it."""
    runner = QuantExperts(module, HOST, activation_of(module), top_k, placer, act)
    object.__setattr__(module, "microscale", runner)  # not a submodule: state dicts do not see it
    return runner


def activation_of(module: Any) -> Activation:
    """The record of a module's gate function, recognised from its attributes and then checked against it.

    Raises:
        CheckpointError: no record computes what the module's own `_apply_gate` computes.
    """
    if getattr(module, "has_post_expert_norm", False):
        raise CheckpointError(
            type(module).__name__, "its experts end in a norm, which microscale does not compute"
        )
    gated, interleaved = bool(getattr(module, "has_gate", True)), not getattr(module, "is_concatenated", True)
    limit = getattr(module, "limit", None)
    candidates = []
    if gated and hasattr(module, "alpha"):
        alpha = float(module.alpha)
        candidates.append(Activation("swiglu_oai", True, interleaved, alpha=alpha, beta=1.0, limit=limit))
    for kind in ("silu", "gelu", "gelu_tanh", "relu2"):
        candidates.append(Activation(kind, gated, interleaved))
        if limit is not None and kind == "silu":
            candidates.append(Activation(kind, gated, interleaved, limit=limit))
    generator = torch.Generator().manual_seed(5)
    h = torch.randn(64, 64, generator=generator, device="cpu") * 6
    try:
        with torch.no_grad():
            wanted = module._apply_gate(h) if gated else module.act_fn(h)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise CheckpointError(type(module).__name__, f"its activation cannot be called: {error}") from error
    for candidate in candidates:
        if torch.allclose(activate(h, candidate), wanted, rtol=1e-5, atol=1e-5):
            return candidate
    raise CheckpointError(type(module).__name__, "its activation is none that microscale knows")


def _experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    if top_k_index.numel() and getattr(module, "_is_expert_parallel", False):
        # Routes to another rank arrive as the id behind the last local expert.
        top_k_index = top_k_index.masked_fill(top_k_index >= module.num_experts, -1)
    runner: QuantExperts | None = getattr(module, "microscale", None)
    if runner is None:  # left dense; the config chooses one function for all layers
        dense: Tensor = type(module).forward.__wrapped__(module, hidden_states, top_k_index, top_k_weights)
        return dense
    return runner(hidden_states, top_k_index, top_k_weights)


def _take_over(module: Any) -> None:
    if NAME not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)
    module._is_hf_initialized = True  # else transformers initialises the parameters that are gone
    module.config._experts_implementation_internal = NAME


def _dense_shapes(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Logical [E, N, K] of the dense parameters; transformers stores some classes transposed."""
    shapes = {}
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        parameter = module._parameters.get(name)
        if parameter is not None:
            e, a, b = parameter.shape
            shapes[name] = (e, b, a) if module.is_transposed else (e, a, b)
    return shapes


def dense_weights(module: Any) -> dict[str, Tensor]:
    """The dense parameters as [E, N, K]."""
    names = _dense_shapes(module)
    dense = {name: module._parameters[name].detach() for name in names}
    return {name: w.transpose(1, 2) if module.is_transposed else w for name, w in dense.items()}


def _first(module: nn.Module) -> str:
    return "gate_up_proj" if hasattr(module, "gate_up_proj_scales") else "up_proj"


def _quant_tensor(module: Any, name: str) -> QuantTensor:
    if hasattr(module, f"{name}_blocks"):
        blocks = getattr(module, f"{name}_blocks").detach()
        e, n, groups, _ = blocks.shape
        fmt = FORMATS["mxfp4"]
        scales = getattr(module, f"{name}_scales").detach()
        return QuantTensor(fmt, (e, n, groups * fmt.block[1]), blocks.view(e, n, -1), scales)
    fmt, shape = module.microscale_formats[name]
    codes, scales, outer = (
        getattr(module, name + suffix) for suffix in ("_codes", "_scales", "_tensor_scale")
    )
    return QuantTensor(fmt, shape, codes, _as_numbers(scales), None if outer is None else _as_numbers(outer))


def _as_bits(t: Tensor) -> Tensor:
    """Float32 scales as the integers of their bits: `model.to(dtype)` would round them, for good, and leaves these."""
    return t.view(torch.int32) if t.dtype == torch.float32 else t


def _as_numbers(t: Tensor) -> Tensor:
    return t.view(torch.float32) if t.dtype == torch.int32 else t
