"""microscale: language models with block-scaled weights, exactly, on the machine you have."""

from microscale.errors import BackendError, CheckpointError, FormatError, MicroscaleError, NoBackendError
from microscale.formats import FORMATS, Format, get_format
from microscale.quant import QuantTensor, dequantize, quantize

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "BackendError",
    "CheckpointError",
    "Format",
    "FormatError",
    "MicroscaleError",
    "NoBackendError",
    "QuantTensor",
    "dequantize",
    "get_format",
    "quantize",
]
