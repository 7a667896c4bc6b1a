"""Who else sees or changes what a model computes; steps that are a chain of kernels would pass them by."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


def hooks_of(module: nn.Module) -> list[Any]:
    """A module's hooks, but for transformers' own: they record what it is asked for, which a step is not."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__name__", "") != "output_capturing_hook"]


def hooks_of_all() -> list[Any]:
    """Hooks of every module there is."""
    return [*_global_forward_hooks.values(), *_global_forward_pre_hooks.values()]
