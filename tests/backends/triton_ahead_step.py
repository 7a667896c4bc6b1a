"""Arguments of a decoded token's kernels beside its products, to compile them ahead."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from gpu_targets import POINTERS, TARGETS

_REST = ("w1", "w2", "bias1", "bias2")  # what one matrix alone leaves out
# Those of a decoded token beside its products: what distinguishes each, and its warps.
STEP: dict[str, tuple[dict[str, Any], int]] = {
    "span": ({"MASKED": False, "RING": False, "TURN": False, "NORM": False}, 4),
    "masked_span": ({"MASKED": True, "RING": False, "TURN": False, "NORM": False}, 4),
    "ring_span": ({"MASKED": False, "RING": True, "TURN": False, "NORM": False, "LONG": False}, 4),
    "token_span": ({"MASKED": False, "RING": True, "TURN": True, "NORM": False, "LONG": False}, 4),
    "normed_span": (
        {"MASKED": False, "RING": True, "TURN": True, "NORM": True, "SINKS": False, "D": 128, "WIDTH": 128},
        8,
    ),
    "norm": ({"BLOCK": 4096, "SHARES": 0, "TWICE": False}, 8),
    "add_norm": ({"BLOCK": 4096, "SHARES": 4, "TWICE": True}, 8),
    "rows": ({"K": 2880, "M": 1, "COUNT": 3, "HELD": 8}, 4),
    "pairs": ({"K": 2880, "M": 1, "COUNT": 3, "HELD": 8, "GROUPS": 2}, 4),
    "row": (
        {"K": 288, "M": 4, "COUNT": 1, "HELD": 2, "BIAS1": False, "BIAS2": False} | dict.fromkeys(_REST),
        4,
    ),
    "router": ({"K": 2880, "ROWS": 4, "COLUMNS": 1024, "BIAS": True, "TWICE": False}, 4),
    "choose": ({"TOP_K": 4, "SLOTS": 4, "BLOCK": 128, "ALL": True}, 1),
    "likeliest": ({"BLOCK": 2048, "PARTS": 128}, 4),
    "gate": ({"BLOCK": 512}, 4),
}


def step(kernel: str, target: str, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments, compiler's options) of a decoded token's other kernels, in gpt-oss' shapes."""
    flags, warps = STEP[kernel]
    own = POINTERS[dtype]
    given: dict[str, Any] = dict.fromkeys(
        (
            "y",
            "x",
            "w",
            "q",
            "k",
            "v",
            "mask",
            "sinks",
            "cos",
            "sin",
            "logits",
            "weights",
            "total",
            "more",
            "norm",
            "bias",
        ),
        own,
    )
    given |= dict.fromkeys(("new_k", "new_v", "q_weight", "k_weight", "gate", "up"), own)
    given |= dict.fromkeys(("w0", "w1", "w2", "bias0", "bias1", "bias2"), own)
    given |= dict.fromkeys(("sums", "peaks", "totals"), "*fp32") | {"arrived": "*i32"}
    given |= dict.fromkeys(("position", "ids"), "*i64") | dict.fromkeys(("scaling", "eps"), "fp32")
    strides = [f"{t}_{d}" for t in "kv" for d in "bhk"]
    counts = ["room", "key_heads", "heads", "keys", "N", "E", "q_b", "q_h", "mask_b", "mask_k"]
    counts += ["N0", "N1", "N2", "new_k_b", "new_v_b", "gate_m", "up_m"]
    given |= dict.fromkeys(strides + counts, "i32") | {"SIZE": 8 * dtype.itemsize}
    given |= {
        "D": 64,
        "WIDTH": 64,
        "SPANS": 32,
        "AHEAD": 4,
        "LONG": True,
        "HEADS": 8,
        "GROUP": 8,
        "ROWS": 16,
        "SINKS": True,
        "WARPS": 4,
        "GROUPS": 1,
        "COLUMNS": 256,
        **dict.fromkeys(("BIAS0", "BIAS1", "BIAS2"), True),
        "PDL": target == "sm_90",
    }
    given |= flags
    if kernel == "likeliest":
        given |= {"keys": "*i64", "V": "i32", "logits_b": "i32"}
    if "span" in kernel:
        attend = import_module("microscale.backends.triton.attend")
        sizes = attend.cut(given["WIDTH"], dtype.itemsize, TARGETS[target].shared)
        given["KEYS"], warps, given["STAGES"] = sizes
    return given, {"num_warps": warps}
