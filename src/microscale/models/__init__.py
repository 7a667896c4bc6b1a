"""Names that stand for models: the bundled one, and configs of public models whose weights are not here."""

from __future__ import annotations

import os
from pathlib import Path

from microscale.errors import CheckpointError, one_line

HERE = Path(__file__).parent
BUNDLED = "stdlib-moe"  # the default of every command

# Configs only: their weights are the publisher's, but every shape is known.
CONFIGS = ("gpt-oss-20b", "gpt-oss-120b")

_LONGEST = 200  # characters of a hub id, which has 96 at the most, or of a name in a message


def resolve(name: str | Path, weights: bool = True) -> Path:
    """The directory of a model: a bundled name, a directory, or an id on the Hugging Face hub.

    Args:
        weights: of a hub id; False fetches its configs only.
    Raises:
        CheckpointError: none of these, or a file; says what was tried.
    """
    if str(name) == BUNDLED or str(name) in CONFIGS:
        return HERE / str(name)
    text = str(name)
    path = Path(text).expanduser()
    if text and _exists(path):
        if not path.is_dir():
            raise CheckpointError(
                path, "is no directory; a model is one, with config.json and .safetensors files"
            )
        return path
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or len(text) > _LONGEST:
        names = ", ".join((BUNDLED, *CONFIGS))
        shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        raise CheckpointError(
            shown or "''", f"no such directory, not a bundled name ({names}), and not a hub id"
        )
    return _download(text, weights)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def config_alone(path: Path) -> bool:
    """Whether a directory has a config and no tensors. What cannot be read is not said to be there."""
    return os.path.exists(path / "config.json") and not any(path.glob("*.safetensors"))


def _download(model_id: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
    if weights:
        patterns.append("*.safetensors")  # never pickles: *.bin and *.pt are not asked for
    try:
        return Path(
            snapshot_download(model_id, allow_patterns=patterns, ignore_patterns=["original/*", "metal/*"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            model_id, f"not a local directory, and the hub did not give it: {one_line(error)}"
        ) from error
