"""Random weights in a config's true shapes: any architecture can be tried without its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microscale.checkpoints.config import CONFIG, architecture
from microscale.errors import CheckpointError, MicroscaleError, brief, one_line

# E8M0 bytes of random blocks: 2^-10 .. 2^-6, so that activations of a random model stay finite at any depth.
_SCALE_BYTES = (117, 121)

MAX_LAYERS = 1024  # a bound on lies: modules are built one by one

# Numbers of which transformers makes a list, an entry each, as soon as a config is made or used: bounds on lies, too.
_MOST = {
    "encoder_no_repeat_ngram_size": 1 << 16,
    "num_labels": 1 << 16,
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "num_layers",
            "n_layers",
            "n_layer",
            "encoder_layers",
            "decoder_layers",
            "num_dense_layers",
            "first_k_dense_replace",
            "num_mtp_layers",
            "num_nextn_predict_layers",
        ),
        MAX_LAYERS,
    ),
}


def dummy_config(path: Path, config: dict[str, Any], layers: int | None) -> Any:
    """transformers' config object, cut to the first `layers` layers.

    Raises:
        CheckpointError: no such layers, or a config that transformers does not take.
    """
    from transformers import AutoConfig

    total = config.get("num_hidden_layers")
    cut = copy.deepcopy(config)
    if layers is not None:
        if not isinstance(total, int):
            problem = "layers cannot be cut: its config says no num_hidden_layers"
            raise CheckpointError(path / CONFIG, problem, expected="an integer", found=brief(total))
        if not 0 < layers <= total:
            raise CheckpointError(path, "layers", expected=f"1 to {total}", found=layers)
        cut["num_hidden_layers"] = layers
        if isinstance(cut.get("layer_types"), list):
            cut["layer_types"] = cut["layer_types"][:layers]
    kind = architecture(cut, path / CONFIG)
    check_counts(path / CONFIG, cut)
    del cut["model_type"]
    with as_checkpoint_error(path / CONFIG, "transformers does not take it"):
        made = AutoConfig.for_model(kind, **cut)
        count = getattr(made.get_text_config(), "num_hidden_layers", None)
    # transformers takes numbers, too, and whatever else in torch has that name, and fails at them later, or not at all.
    if not isinstance(made.dtype, torch.dtype | None):
        raise CheckpointError(path / CONFIG, "dtype", expected="such as bfloat16", found=brief(made.dtype))
    if isinstance(count, int) and not 0 < count <= MAX_LAYERS:
        raise CheckpointError(path / CONFIG, "layers", expected=f"1 to {MAX_LAYERS}", found=count)
    return made


def check_counts(path: Path, config: dict[str, Any]) -> None:
    """Refuse a config, or one that it holds, whose lists would take all memory before there is a layer to count.

    Raises:
        CheckpointError: names the file, the key, and the bound.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(path, value)
        elif key in _MOST and isinstance(value, int) and value > _MOST[key]:
            raise CheckpointError(path, key, expected=f"at most {_MOST[key]}", found=brief(value))


@contextmanager
def as_checkpoint_error(path: Path, problem: str) -> Iterator[None]:
    """Whatever transformers' own checks, or its modules, raise on a config that nobody vouches for."""
    try:
        yield
    except MicroscaleError:
        raise
    except Exception as error:  # whoever wrote the config is owed its name; what its values break is anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(path, f"{problem}: {reason}") from error


def meta_model(config: Any, path: Path) -> Any:
    """The model that transformers would build, without memory behind its parameters and with packed experts.

    Raises:
        CheckpointError: it cannot be built; `path` is whose config is to blame.
    """
    with as_checkpoint_error(path / CONFIG, "transformers cannot build a model by it"):
        return _meta_model(config)


def _meta_model(config: Any) -> Any:
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


def fill(model: Any, device: torch.device, seed: int = 0) -> None:
    """Give every parameter a value, on a device: random bytes for codes, moderate scales, small normals."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dtype == torch.uint8:
            value = _random_bytes(p.shape, generator)
            if name.endswith("_scales"):
                value.remainder_(_SCALE_BYTES[1] - _SCALE_BYTES[0] + 1).add_(_SCALE_BYTES[0])
        else:
            value = torch.empty(p.shape, dtype=p.dtype, device=device)
            if p.dim() < 2 and name.endswith("weight"):  # norms
                value.fill_(1)
            else:
                value.normal_(0.0, 0.02, generator=generator)
        p.data = value


def _random_bytes(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Eight bytes a draw: gigabytes are wanted."""
    words = torch.empty(-(-shape.numel() // 8), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[: shape.numel()].view(shape)


def dummy_model(
    path: Path, config: dict[str, Any], layers: int | None, dtype: Any, device: torch.device
) -> Any:
    """A transformers model with random weights on a device; memory is taken once, for the packed weights themselves."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    cut = dummy_config(path, config, layers)
    # transformers is given one number for each tensor, stretched to its shape, and what it makes of these is filled.
    state = {
        n: p.new_zeros((), device="cpu").expand(p.shape) for n, p in meta_model(cut, path).named_parameters()
    }
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(cut)]
    model = architecture.from_pretrained(None, config=cut, state_dict=state, dtype=dtype)
    fill(model, device)
    return model
