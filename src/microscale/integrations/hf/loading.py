"""`microscale.load`: a checkpoint that has been checked, as a transformers model that is ready to generate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from microscale.checkpoints import open_checkpoint
from microscale.checkpoints.config import read_config
from microscale.errors import CheckpointError, SettingError
from microscale.integrations.hf.options import Options, using
from microscale.machine import detect
from microscale.models import has_weights, resolve

Progress = Callable[[Iterable[Any]], Iterable[Any]]


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
        SettingError: there is no such device.
    """
    path = resolve(model)
    target = target_device(device)
    if load_format not in ("auto", "dummy"):
        raise CheckpointError(path, "unknown load_format", expected="auto or dummy", found=load_format)
    if load_format == "dummy":
        from microscale.integrations.hf.dummy import dummy_model

        with using(Options(backend, act, canary, place=False, checkpoint=path)) as options:
            host = dummy_model(path, read_config(path), layers, dtype, target)
        return _ready(host, target, options, progress, kwargs)
    if layers is not None:
        raise CheckpointError(path, "layers can be cut with load_format='dummy' only")
    if (path / "config.json").exists() and not has_weights(path):
        hint = "it is a config alone; load_format='dummy' (--load-format dummy) runs it with random weights"
        raise CheckpointError(path, f"no .safetensors files: {hint}")
    # Before transformers is imported: a file that lies is known in an instant.
    checkpoint = open_checkpoint(path)

    from transformers import AutoModelForCausalLM

    from microscale.integrations.hf.dummy import dummy_config, meta_model

    config = dummy_config(path, checkpoint.config, None)
    with using(Options(backend, act, canary, place=False, checkpoint=checkpoint)) as options:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, trust_remote_code=False, **kwargs
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            meta_model(config, path)  # raises a CheckpointError if the config is at fault
            raise
    host, info = loaded
    _check_complete(path, info)
    return _ready(host, target, options, progress, kwargs)


def target_device(device: str | torch.device | None = None) -> torch.device:
    """Where a model goes that is to run on `device`; None: the machine's first GPU, else the CPU.

    Raises:
        SettingError: this machine has no such device, or torch knows no such word.
    """
    machine = detect()
    word = str(device or machine.device)
    kind, _, index = word.partition(":")
    kind = "rocm" if kind == "cuda" and machine.device == "rocm" else kind
    kinds = list(dict.fromkeys(["cpu", *(g.kind for g in machine.gpus)]))
    if kind not in kinds:
        raise SettingError(f"unknown device {word!r}; known: {', '.join(kinds)}")
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
    """transformers fills what is missing with random numbers and goes on; we do not."""
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
