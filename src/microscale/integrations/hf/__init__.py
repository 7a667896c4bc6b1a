"""transformers as the host: it owns architectures, attention, caches and generation; we own experts and linears."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import wrapt

from microscale import env
from microscale.errors import SettingError


def install() -> None:
    """Take over `quant_method: mxfp4`: now if transformers is loaded, else as soon as it is."""
    try:
        if not env.transformers_hook():
            return
    except SettingError as error:  # `import microscale` is no place to fail; `doctor` says it, too
        warnings.warn(f"{error}; taken for on", stacklevel=2)
    module = "transformers.quantizers.auto"
    if module in sys.modules:
        _register(sys.modules[module])
    else:
        wrapt.register_post_import_hook(_register, module)


@contextmanager
def taking_over() -> Iterator[None]:
    """For a while `quant_method: mxfp4` is ours, whatever MICROSCALE_TRANSFORMERS says: for `load`, which names us."""
    from transformers.quantizers import auto

    before = auto.AUTO_QUANTIZER_MAPPING["mxfp4"]
    _register(auto)
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING["mxfp4"] = before


def _register(auto: Any) -> None:
    stock = auto.AUTO_QUANTIZER_MAPPING["mxfp4"]
    if not (isinstance(stock, partial) and stock.func is _make_quantizer):
        auto.AUTO_QUANTIZER_MAPPING["mxfp4"] = partial(_make_quantizer, stock)


def _make_quantizer(stock: Any, config: Any, **kwargs: Any) -> Any:
    """Ours, or transformers' own where the caller asks it to dequantise or to quantise dense weights itself."""
    if getattr(config, "dequantize", False) or not kwargs.get("pre_quantized", True):
        return stock(config, **kwargs)
    from microscale.integrations.hf.quantizer import MicroscaleQuantizer

    return MicroscaleQuantizer(config, **kwargs)
