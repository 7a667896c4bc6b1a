"""Every environment variable microscale reads: default and meaning. No other file looks at os.environ."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from microscale.errors import SettingError

# The C++ core's instruction-set levels, narrowest first: `ms_level` in csrc/microscale.h.
CPU_LEVELS = ("plain", "avx2", "avx512", "avx512_bf16", "amx")

# How often choices are proved.
CANARIES = ("class", "all", "off")

VARIABLES = {
    "MICROSCALE_BACKEND": "name of the only backend allowed; unset: the oracle chooses",
    "MICROSCALE_CANARY": "`class` (default): prove each distinct choice once; `all`: every layer; `off`",
    "MICROSCALE_CPU_LEVEL": f"widest instruction set the C++ core may use ({', '.join(CPU_LEVELS)}); unset: all",
    "MICROSCALE_DENSE": "`off`: linears whose weights are not quantised stay with PyTorch on the CPU, too",
    "MICROSCALE_EMULATION_TILE": "bytes of dequantised weights that emulation may hold at a time; default 64MiB",
    "MICROSCALE_EMULATION_CACHE": "bytes of dequantised weights that emulation may keep for good; default 0",
    "MICROSCALE_TRANSFORMERS": "`off`: `from_pretrained` keeps transformers' own quantisers; `load` has ours always",
}

_ON, _OFF = ("on", "1", "yes", "true"), ("off", "0", "no", "false")
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}


def parse_bytes(text: str, what: str) -> int:
    """ "512MiB" -> 536870912. Units: B, kB, MB, GB, KiB, MiB, GiB; a bare number is bytes.

    Raises:
        SettingError: not a size; the message names `what`.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmg]i?|)b?\s*", text.lower())
    if match is None:
        raise SettingError(f"{what}={text!r} is not a size such as 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def backend() -> str | None:
    """The forced backend, if any."""
    return os.environ.get("MICROSCALE_BACKEND") or None


def canary() -> str:
    """How often choices are proved: "class", "all" or "off"."""
    value = os.environ.get("MICROSCALE_CANARY") or "class"
    if value not in CANARIES:
        raise SettingError(f"MICROSCALE_CANARY={value!r}; known: {', '.join(CANARIES)}")
    return value


def cpu_level() -> str | None:
    """The widest level of the C++ core that is allowed; None: all. Read at every call, so that tests can switch."""
    value = os.environ.get("MICROSCALE_CPU_LEVEL") or None
    if value is not None and value not in CPU_LEVELS:
        raise SettingError(f"MICROSCALE_CPU_LEVEL={value!r}; known: {', '.join(CPU_LEVELS)}")
    return value


@contextmanager
def using_cpu_level(word: str) -> Iterator[None]:
    """Lower the C++ core to a level for a while."""
    before = os.environ.get("MICROSCALE_CPU_LEVEL")
    os.environ["MICROSCALE_CPU_LEVEL"] = word
    try:
        yield
    finally:
        if before is None:
            del os.environ["MICROSCALE_CPU_LEVEL"]
        else:
            os.environ["MICROSCALE_CPU_LEVEL"] = before


def dense() -> bool:
    """Whether the C++ core may multiply weights that are not quantised.

    Raises:
        SettingError: neither on nor off; `transformers_hook` likewise.
    """
    return _switch("MICROSCALE_DENSE")


def emulation_tile() -> int:
    """Bytes of float32 weights that emulation may hold at a time."""
    return parse_bytes(os.environ.get("MICROSCALE_EMULATION_TILE") or "64MiB", "MICROSCALE_EMULATION_TILE")


def emulation_cache() -> int:
    """Bytes of dequantised weights that emulation may keep, over all layers."""
    return parse_bytes(os.environ.get("MICROSCALE_EMULATION_CACHE") or "0", "MICROSCALE_EMULATION_CACHE")


def transformers_hook() -> bool:
    """Whether importing microscale takes over the checkpoints it can read."""
    return _switch("MICROSCALE_TRANSFORMERS")


def _switch(name: str) -> bool:
    value = os.environ.get(name, "").lower()
    if value not in ("", *_ON, *_OFF):
        raise SettingError(f"{name}={value!r}; known: on, off")
    return value not in _OFF


def wait_quietly() -> None:
    """Let idle OpenMP threads sleep instead of spin. Only before torch is imported, and only if nobody has decided.

    With one busy neighbour on two cores, spinning threads made decoding ten times slower; sleeping ones cost nothing.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
