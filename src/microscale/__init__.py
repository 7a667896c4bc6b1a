"""microscale: language models with block-scaled weights, exactly, on the machine you have."""

from typing import TYPE_CHECKING, Any

from microscale.errors import (
    BackendError,
    CheckpointError,
    FormatError,
    MicroscaleError,
    NoBackendError,
    PackedError,
    PromptError,
)
from microscale.formats import FORMATS, Format, get_format
from microscale.integrations import hf as _hf

if TYPE_CHECKING:
    from microscale.integrations.hf.graph import Decoder
    from microscale.quant import QuantTensor, dequantize, quantize

__version__ = "0.1.0"


def load(model: Any, **options: Any) -> Any:
    """A checkpoint as a transformers model that keeps its weights packed; see `integrations.hf.loading.load`."""
    from microscale.integrations.hf.loading import load as load_model

    return load_model(model, **options)


def requantize(model: Any, fmt: str | Format, **options: Any) -> Any:
    """Store a loaded model's weights in a format, in place; see `integrations.hf.requantize.requantize`."""
    from microscale.integrations.hf.requantize import requantize as requantize_model

    return requantize_model(model, fmt, **options)


def __getattr__(name: str) -> Any:
    """What needs torch, imported when first asked for: `microscale --help` does not wait for it."""
    if name in ("QuantTensor", "dequantize", "quantize"):
        from microscale import quant

        return getattr(quant, name)
    if name == "Decoder":
        from microscale.integrations.hf.graph import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_hf.install()

__all__ = [
    "FORMATS",
    "BackendError",
    "CheckpointError",
    "Decoder",
    "Format",
    "FormatError",
    "MicroscaleError",
    "NoBackendError",
    "PackedError",
    "PromptError",
    "QuantTensor",
    "dequantize",
    "get_format",
    "load",
    "quantize",
    "requantize",
]
