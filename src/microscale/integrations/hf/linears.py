"""A host model's linears whose weights are not quantised: nn.Linear, and routers that hold such a weight themselves.

With them gpt-oss' norms: eight small operators of torch for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from microscale.canary import Placer
from microscale.dense import DenseLinear, DenseModule, place_dense


def dense_class(module: nn.Module) -> Callable[[], type[DenseModule]] | None:
    """Gives what a module becomes if the C++ core takes its product; None: it is none of these.

    A subclass of nn.Linear may compute something else, so it is left alone.
    """
    if type(module) in (nn.Linear, DenseLinear):
        return lambda: DenseLinear
    if type(module).__name__ in ("GptOssTopKRouter", "DenseGptOssRouter"):  # not imported to ask
        return _gpt_oss_router
    return None


def dense_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of those that `dense_class` knows."""
    for name, module in model.named_modules():
        if dense_class(module) is not None:
            yield name, module


def place_linears(model: nn.Module, dtype: torch.dtype, placer: Placer) -> None:
    """Let the core run those linears of a model that it takes, each distinct problem proved once."""
    for _, module in dense_modules(model):
        made = dense_class(module)
        assert made is not None
        place_dense(module, made(), dtype, placer)
    if any(type(module).__name__ == "DenseGptOssRouter" for module in model.modules()):
        from microscale.integrations.hf.gpt_oss import take_norms

        take_norms(model)


def _gpt_oss_router() -> type[DenseModule]:
    from microscale.integrations.hf.gpt_oss import DenseGptOssRouter

    return DenseGptOssRouter
