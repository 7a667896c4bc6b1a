"""config.json: read strictly, its numbers checked before any of them sizes anything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from microscale.checkpoints.strict import read_object
from microscale.errors import CheckpointError, brief

CONFIG = "config.json"
MAX_CONFIG_BYTES = 10_000_000

_REQUIRED = object()


def read_config(directory: str | Path) -> dict[str, Any]:
    """The object in config.json. NaN and Infinity are accepted: published configs (Nemotron-H) hold them.

    Raises:
        CheckpointError: no such file, over 10 MB, or not one JSON object without duplicate keys.
    """
    return read_object(Path(directory) / CONFIG, MAX_CONFIG_BYTES, constants=True)


def quant_method(config: dict[str, Any], path: str | Path) -> str | None:
    """How the weights were quantised, in the producer's word; None for a checkpoint that does not say it is.

    Raises:
        CheckpointError: a quantization_config without a quant_method.
    """
    if config.get("compression_config") is not None:  # compressed-tensors before 0.8
        return "compressed-tensors"
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(method, str):
        raise CheckpointError(
            path, "quantization_config", expected="a quant_method", found=brief(quantization)
        )
    return method


def architecture(config: dict[str, Any], path: str | Path = CONFIG) -> str:
    """config["model_type"], where transformers itself implements it. A checkpoint's own code is never run.

    Imports transformers.

    Raises:
        CheckpointError: no model_type, or one that transformers does not know.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(path, "names no model_type", expected="a string", found=brief(kind))
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        problem = f"unknown model_type {brief(kind)}: the installed transformers does not implement it"
        if "auto_map" in config:
            problem += "; the checkpoint's own code (auto_map) is never executed"
        raise CheckpointError(path, problem)
    return kind


def integer(config: dict[str, Any], key: str, path: Path, maximum: int, default: Any = _REQUIRED) -> int:
    """A positive integer of the config; `default` where the key is absent or null.

    Raises:
        CheckpointError: missing without a default, not an integer (true is none), or not in [1, maximum].
    """
    value = config.get(key)
    if value is None and default is not _REQUIRED:
        value = default
    if type(value) is not int or not 1 <= value <= maximum:
        raise CheckpointError(path, key, expected=f"an integer from 1 to {maximum}", found=brief(value))
    return value


def flag(config: dict[str, Any], key: str, path: Path, default: bool) -> bool:
    """A boolean of the config; `default` where the key is absent."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(path, key, expected="true or false", found=brief(value))
    return value


def positive(config: dict[str, Any], key: str, path: Path, default: float) -> float:
    """A positive finite number of the config; `default` where the key is absent."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(path, key, expected="a positive number", found=brief(value))
    return float(value)
