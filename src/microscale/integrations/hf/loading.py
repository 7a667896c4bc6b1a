"""`microscale.load`: a checkpoint that has been checked, as a transformers model that is ready to generate."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from microscale.canary import DTYPES
from microscale.checkpoints import Checkpoint, open_checkpoint
from microscale.checkpoints.config import MAX_CONFIG_BYTES, read_config
from microscale.checkpoints.strict import read_object
from microscale.errors import CheckpointError, CheckpointWarning, SettingError, brief, one_line
from microscale.integrations.hf import taking_over
from microscale.integrations.hf.options import Options, using
from microscale.machine import detect
from microscale.models import config_alone, resolve

_GENERATION = "generation_config.json"
Progress = Callable[[Iterable[Any]], Iterable[Any]]
_LOADING = Lock()  # transformers patches its own classes while it makes a model, for other threads, too


def load(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    backend: str | None = None,
    act: str = "a16",
    canary: str | None = None,
    load_format: str = "auto",
    layers: int | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Any:
    """A transformers causal language model whose quantised weights stay packed.

    Args:
        model: a directory, a hub id, or a bundled name ("stdlib-moe"; "gpt-oss-20b" with `load_format="dummy"`).
        device: where to run; by default the machine's first GPU, else the CPU.
        dtype: of activations and unquantised weights; "auto" is the checkpoint's own.
        backend: the only backend allowed.
        act: how activations are stored before each product: "a16" (not quantised), "a8", "a6", "a4", a format.
        canary: "class" (prove each distinct choice once), "all", "off".
        load_format: "auto" reads the checkpoint; "dummy" invents random weights in the config's shapes.
        layers: dummy only: cut the model to its first layers.
        progress: wraps the iterable of layers to place, as tqdm does.
        kwargs: go to transformers' `from_pretrained`.
    Returns:
        The model, in eval mode, every quantised layer placed on a backend and proved; linears that are not quantised
        are placed too, where the C++ core takes them.
    Raises:
        CheckpointError: the files are not what they say, or tensors are missing.
        NoBackendError: every backend refused a layer, or the forced one did; carries all reasons.
        SettingError: there is no such device or dtype, or code of a checkpoint was to run.
    """
    path = resolve(model)
    target, dtype = target_device(device), target_dtype(dtype)
    if kwargs.pop("trust_remote_code", False):
        raise SettingError(f"{path}: trust_remote_code: code of a checkpoint is never run")
    if load_format not in ("auto", "dummy"):
        raise CheckpointError(path, "unknown load_format", expected="auto or dummy", found=load_format)
    if load_format == "dummy":
        options = Options(backend, act, canary, place=False, checkpoint=path)
        with _LOADING, using(options):
            from microscale.integrations.hf.dummy import dummy_model

            host = dummy_model(path, read_config(path), layers, dtype, target)
        return _ready(host, target, options, progress, kwargs)
    if layers is not None:
        raise CheckpointError(path, "layers can be cut with load_format='dummy' only")
    if config_alone(path):
        hint = "it is a config alone; load_format='dummy' (--load-format dummy) runs it with random weights"
        raise CheckpointError(path, f"no .safetensors files: {hint}")
    # Before transformers is imported: a file that lies is known in an instant.
    checkpoint = open_checkpoint(path)
    options = Options(backend, act, canary, place=False, checkpoint=checkpoint)
    with _LOADING, using(options):
        host = _from_pretrained(checkpoint, dtype, kwargs)
    return _ready(host, target, options, progress, kwargs)


def _from_pretrained(checkpoint: Checkpoint, dtype: torch.dtype | str, kwargs: dict[str, Any]) -> Any:
    """transformers' model of a checkpoint, whole, its experts packed and not placed."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from microscale.integrations.hf.dummy import dummy_config, meta_model

    path = checkpoint.path
    config = dummy_config(path, checkpoint.config, None)
    _check_generation(path / _GENERATION)
    _check_index(checkpoint)
    with taking_over():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, trust_remote_code=False, **kwargs
            )
        except (OSError, SafetensorError) as e:
            # All files were read a moment ago: somebody has removed or rewritten them since.
            raise CheckpointError(path, f"transformers cannot read it: {one_line(e)}") from e
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            ImportError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ):
            host = meta_model(config, path)  # raises a CheckpointError if the config is at fault
            _check_shapes(checkpoint, host)
            _check_experts(checkpoint, host)
            raise
    host, info = loaded
    _check_complete(path, info)
    _check_kinds(checkpoint, host)
    return host


def _check_generation(file: Path) -> None:
    """Refuse a generation config that transformers would go on without, or fail at, when the weights are loaded."""
    from transformers import GenerationConfig

    from microscale.integrations.hf.dummy import as_checkpoint_error, check_counts

    if not os.path.lexists(file):
        return
    check_counts(file, read_object(file, MAX_CONFIG_BYTES, constants=True))
    with as_checkpoint_error(file, "transformers does not take it"):
        GenerationConfig.from_pretrained(file.parent)


def _check_index(checkpoint: Checkpoint) -> None:
    """transformers writes into an index's `metadata`, which the shards do not need: it has to be there."""
    index = checkpoint.source.index
    if index is not None and not isinstance(index.metadata, dict):
        raise CheckpointError(
            index.path,
            "metadata, which transformers asks for",
            expected="an object",
            found=brief(index.metadata),
        )


def _check_shapes(checkpoint: Checkpoint, host: Any) -> None:
    """Refuse tensors that are not of the shapes that the config gives them, where both have one name for them."""
    found = {info.name: info for info in checkpoint.source}
    for name, p in host.named_parameters():
        info = found.get(name)
        if info is not None and p.is_floating_point() and tuple(info.shape) != tuple(p.shape):
            raise CheckpointError(
                checkpoint.path,
                "not of the shape that config.json says",
                tensor=name,
                expected=list(p.shape),
                found=list(info.shape),
            )


def _check_experts(checkpoint: Checkpoint, host: Any) -> None:
    """Refuse experts that lie one by one, which transformers stacks, and of which some are missing."""
    stacked = [p for name, p in host.named_parameters() if ".experts." in name and p.dim() == 3]
    count = max((p.shape[0] for p in stacked), default=0)
    found: dict[tuple[str, str], set[int]] = {}
    for info in checkpoint.source:
        if match := re.fullmatch(r"(.*\.experts)\.([0-9]{1,6})\.(.*)", info.name):
            found.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (before, after), numbers in found.items():
        for number in range(count):
            if number not in numbers:
                tensor = f"{before}.{number}.{after}"
                raise CheckpointError(
                    checkpoint.path, "missing", tensor=tensor, expected=f"{count} of them", found=len(numbers)
                )


def _check_kinds(checkpoint: Checkpoint, host: Any) -> None:
    """Refuse integers in the place of numbers: codes, whose scales nothing tells, and transformers casts them."""
    for name, p in host.named_parameters():
        if p.is_floating_point() and name in checkpoint.source:
            info = checkpoint.source.info(name)
            if not info.dtype.is_floating_point:
                problem = "quantised, but config.json does not say how"
                raise CheckpointError(info.file, problem, tensor=name, expected=p.dtype, found=info.dtype)


def target_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A dtype, or "auto", from what `load` takes: torch's, and "bf16", "fp16", "fp32" or torch's words for them.

    Raises:
        SettingError: it is no floating point, or no dtype.
    """
    if dtype == "auto":
        return dtype
    found = DTYPES.get(dtype, getattr(torch, dtype, None)) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        known = ", ".join(("auto", *DTYPES))
        raise SettingError(f"unknown dtype {dtype!r}; known: {known}, and torch's floating ones")
    return found


def target_device(device: str | torch.device | None = None) -> torch.device:
    """Where a model goes that is to run on `device`; None: the machine's first GPU, else the CPU.

    Raises:
        SettingError: this machine has no such device, or torch knows no such word.
    """
    machine = detect()
    word = machine.device if device is None else str(device)
    kind, _, index = word.partition(":")
    kind = "rocm" if kind == "cuda" and machine.device == "rocm" else kind
    kinds = list(dict.fromkeys(["cpu", *(g.kind for g in machine.gpus)]))
    if kind not in kinds:
        raise SettingError(f"unknown device {brief(word)}; known: {', '.join(kinds)}")
    count = 1 if kind == "cpu" else sum(g.kind == kind for g in machine.gpus)
    if index and not (re.fullmatch(r"[0-9]{1,4}", index) and int(index) < count):
        raise SettingError(f"device {word}: this machine has {count} of that kind, numbered from 0")
    return torch.device(word.replace("rocm", "cuda"))


def _ready(
    host: Any, target: torch.device, options: Options, progress: Progress | None, kwargs: dict[str, Any]
) -> Any:
    from microscale.integrations.hf.attention import fuse_sinks, triton_steps
    from microscale.integrations.hf.quantizer import place_all

    host = host.to(target).eval()
    place_all(host, options.placer(), progress)
    ours = target.type == "cpu" or triton_steps(target)
    if ours and kwargs.get("attn_implementation") is None:
        fuse_sinks(host)
    return host


def _check_complete(path: Path, info: dict[str, Any]) -> None:
    """transformers fills what is missing with random numbers and goes on; we do not, and say what nothing reads."""
    for key, problem in (
        ("missing_keys", "missing from the checkpoint"),
        ("mismatched_keys", "of the wrong shape"),
    ):
        names = sorted(str(name) for name in info.get(key) or ())
        if names:
            raise CheckpointError(path, f"{len(names)} tensors {problem}, such as", tensor=names[0])
    scales = sorted(name for name in info.get("unexpected_keys") or () if "scale" in name)
    if scales:
        raise CheckpointError(path, f"{len(scales)} scales that nothing reads, such as", tensor=scales[0])
    if unread := sorted(info.get("unexpected_keys") or ()):
        # Towers of models that see, and heads for training, are left out by design; a layer too few is not.
        count, first = len(unread), unread[0][:200]
        warnings.warn(
            f"{path}: {count} tensors that the model of its config.json has no use for, such as {first!r}",
            CheckpointWarning,
            stacklevel=4,
        )
