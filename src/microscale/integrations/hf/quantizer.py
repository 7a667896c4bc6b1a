"""The transformers quantiser that keeps `mxfp4` checkpoints packed, on any device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from microscale.canary import Placer
from microscale.checkpoints import open_checkpoint
from microscale.errors import CheckpointError
from microscale.formats import FORMATS
from microscale.integrations.hf.experts import attach, experts_modules, swap_parameters
from microscale.integrations.hf.linears import place_linears
from microscale.integrations.hf.options import current_options
from microscale.nn import runner_of


class MicroscaleQuantizer(HfQuantizer):
    """Swaps experts for packed ones before loading, and places them on a backend after it.

    The hooks take whatever arguments the installed transformers passes: their signatures change between releases.
    """

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is required: there is a backend for every machine."""

    def update_weight_conversions(
        self, weight_conversions: list[Any], *args: Any, **kwargs: Any
    ) -> list[Any]:
        """Packed parameters have the checkpoint's names and shapes, so nothing is converted (or copied)."""
        return weight_conversions

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        files = kwargs.get("checkpoint_files")
        if files and current_options().checkpoint is None:
            # from_pretrained was called directly; `load` has already looked.
            open_checkpoint(Path(os.path.commonpath([Path(f).parent for f in files])))
        found = list(experts_modules(model))
        if not found:
            raise CheckpointError(
                model.config.name_or_path, f"quant_method mxfp4, but {type(model).__name__} has no experts"
            )
        for _, module in found:
            swap_parameters(module, FORMATS["mxfp4"])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        attach_all(model)
        if current_options().place:
            place_all(model, current_options().placer())
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed parameters are saved under the names they were read from."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the packed weights can be trained; the weights themselves cannot."""
        return True


def attach_all(model: Any) -> None:
    """Give every swapped experts module of `model` its runner; all share one placer."""
    options = current_options()
    placer = options.placer()
    top_k = top_k_of(model.config)
    for _, module in experts_modules(model):
        attach(module, top_k, placer, options.act)


def top_k_of(config: Any) -> int:
    """Experts per token; 1 where the config does not say."""
    config = config.get_text_config()
    return getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1


def runners(model: nn.Module) -> list[tuple[str, Any]]:
    """(module path, runner) of everything in `model` that runs on a backend."""
    found = ((name, runner_of(module)) for name, module in model.named_modules())
    return [(name, runner) for name, runner in found if runner is not None]


def activation_dtype(model: Any) -> torch.dtype:
    """What the model's activations arrive in; bfloat16 where most of its parameters are codes."""
    dtype: torch.dtype = model.dtype
    return dtype if dtype.is_floating_point else torch.bfloat16


def place_all(model: Any, placer: Placer, progress: Any = None) -> None:
    """Choose, pack and prove for every quantised layer, in order; then for the linears that are not, with `placer`."""
    dtype = activation_dtype(model)
    for _, runner in progress(runners(model)) if progress else runners(model):
        runner.place(dtype)
    place_linears(model, dtype, placer)
