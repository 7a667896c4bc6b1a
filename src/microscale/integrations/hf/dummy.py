"""Random weights in a config's true shapes: any architecture can be tried without its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microscale.errors import CheckpointError

# E8M0 bytes of random blocks: 2^-10 .. 2^-6, so that activations of a random model stay finite at any depth.
_SCALE_BYTES = (117, 121)


def dummy_config(path: Path, config: dict[str, Any], layers: int | None) -> Any:
    """transformers' config object, cut to the first `layers` layers."""
    from transformers import AutoConfig

    total = config.get("num_hidden_layers")
    cut = copy.deepcopy(config)
    if layers is not None:
        if not isinstance(total, int) or not 0 < layers <= total:
            raise CheckpointError(path, "layers", expected=f"1 to {total}", found=layers)
        cut["num_hidden_layers"] = layers
        if isinstance(cut.get("layer_types"), list):
            cut["layer_types"] = cut["layer_types"][:layers]
    try:
        return AutoConfig.for_model(cut.pop("model_type", ""), **cut)
    except ValueError as error:
        raise CheckpointError(path, f"unknown architecture: {str(error).splitlines()[0]}") from error


def meta_model(config: Any) -> Any:
    """The model that transformers would build, without memory behind its parameters and with packed experts."""
    from transformers import AutoModelForCausalLM

    from microscale.formats import FORMATS
    from microscale.integrations.hf.experts import experts_modules, swap_parameters

    quantised = getattr(config, "quantization_config", None)
    plain = copy.deepcopy(config)
    if quantised is not None:
        del plain.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain, dtype=config.dtype or torch.bfloat16)
    if quantised is not None:
        for _, module in list(experts_modules(model)):
            swap_parameters(module, FORMATS["mxfp4"])
    return model


def random_state(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """A value for every parameter of a meta model: random bytes for codes, moderate scales, small normals."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.dtype == torch.uint8:
            state[name] = _random_bytes(p.shape, generator)
            if name.endswith("_scales"):
                state[name].remainder_(_SCALE_BYTES[1] - _SCALE_BYTES[0] + 1).add_(_SCALE_BYTES[0])
        elif p.dim() < 2 and name.endswith("weight"):  # norms
            state[name] = torch.ones(p.shape, dtype=p.dtype)
        else:
            state[name] = torch.empty(p.shape, dtype=p.dtype).normal_(0.0, 0.02, generator=generator)
    return state


def _random_bytes(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Eight bytes a draw: gigabytes are wanted."""
    words = torch.empty(-(-shape.numel() // 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[: shape.numel()].view(shape)


def dummy_model(path: Path, config: dict[str, Any], layers: int | None, dtype: Any = "auto") -> Any:
    """A transformers model with random weights; memory is taken once, for the packed weights themselves."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    cut = dummy_config(path, config, layers)
    state = random_state(meta_model(cut))
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(cut)]
    return architecture.from_pretrained(None, config=cut, state_dict=state, dtype=dtype)
