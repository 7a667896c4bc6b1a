"""Finds the cuts of Hopper's kernels again: every candidate's numbers are checked, and the fastest of each row is kept.

The rows, numbers of tokens and of routes up to which one cut is used, stay those of `cuts.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
import triton

from microscale.backends.triton import tiles
from microscale.bench.tune_experts import tune_moe
from microscale.bench.tune_linears import tune_linear
from microscale.errors import MicroscaleError
from microscale.formats import FORMATS

# The format that stands for its group.
FORMAT_OF = {"4 bits": "mxfp4", "6 or 8 bits": "mxfp8_e4m3", "block": "fp8_block128"}


def tune(groups: list[str], ops: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """What `cuts.json` should say on this GPU; groups and kinds of layer that are left out stay as they are.

    Raises:
        MicroscaleError: this GPU does not run Hopper's kernels.
    """
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not tiles.target(device).hopper:
        raise MicroscaleError("bench tune needs a Hopper GPU (sm_90) and triton 3.6, whose cuts it measures")
    text = (resources.files("microscale.backends.triton") / "cuts.json").read_text("utf-8")
    document: dict[str, Any] = json.loads(text)
    document["measured"] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "formats": FORMAT_OF,
    }
    with torch.no_grad():
        for name in groups:
            table, fmt = document["tables"]["sm_90"][name], FORMATS[FORMAT_OF[name]]
            if "linear" in ops:
                table["linear"] = list(tune_linear(name, fmt, say))
                torch.cuda.empty_cache()
            if "moe" in ops:
                # Of other models than these the row stays as it was.
                found = zip(tune_moe(name, fmt, say), table["moe"], strict=True)
                table["moe"] = [row if row["us"] else was for row, was in found]
                torch.cuda.empty_cache()
    return document
