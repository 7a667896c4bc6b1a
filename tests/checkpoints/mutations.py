"""Lies for the fuzz tests: strategies for JSON junk, and changes to a header or to raw bytes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from microscale.checkpoints.header import DTYPES

SHARD = "model-00001-of-00003.safetensors"
INTEGERS = st.sampled_from(
    (0, 1, -1, 2, 3, 31, 32, 33, 64, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**12)
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    INTEGERS,
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(("U8", "BF16", "F4", "F8_E8M0", "../x.safetensors", "a\0", "x" * 3000, "\ud800", SHARD)),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)

HEADER_LIES = [
    "field",
    "shape",
    "offsets",
    "dtype",
    "steal",
    "drop",
    "rename",
    "copy",
    "order",
    "extra",
    "meta",
]
FRAGMENTS = st.binary(max_size=4) | st.sampled_from((b"[" * 99, b'"', b"{", b"1e999", b"\\u0000"))


def mutate_header(draw: st.DrawFn, header: dict[str, Any], size: int) -> None:
    """One structured lie (or harmless change) in a header's JSON."""
    names = [n for n in header if n != "__metadata__"]
    if not names:
        return
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    entry = header[name]
    kind = draw(st.sampled_from(HEADER_LIES))
    if not isinstance(entry, dict) or not isinstance(header[other], dict):
        return
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if kind == "field":
        entry[draw(st.sampled_from(("dtype", "shape", "data_offsets")))] = draw(JUNK)
    elif kind == "shape" and isinstance(shape, list):
        edit = draw(st.sampled_from(("set", "insert", "remove", "reverse", "same size")))
        where = draw(st.integers(0, max(len(shape) - 1, 0)))
        if edit == "set" and shape:
            shape[where] = draw(INTEGERS | JUNK)
        elif edit == "insert":
            shape.insert(where, draw(INTEGERS))
        elif edit == "remove" and shape:
            del shape[where]
        elif edit == "same size":
            shape.append(1)
        else:
            shape.reverse()
    elif kind == "offsets" and isinstance(offsets, list) and offsets:
        where = draw(st.integers(0, len(offsets) - 1))
        near = st.integers(-8, 8).map(lambda d: offsets[where] + d if isinstance(offsets[where], int) else d)
        offsets[where] = draw(near | st.integers(0, size) | INTEGERS)
    elif kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(tuple(DTYPES)))
    elif kind == "steal":
        entry["data_offsets"], header[other]["data_offsets"] = header[other].get("data_offsets"), offsets
    elif kind == "drop":
        del header[name]
    elif kind == "rename":
        header[draw(st.text(max_size=6) | st.just(other))] = header.pop(name)
    elif kind == "copy":
        header[draw(st.text(max_size=6))] = json.loads(dump(entry))
    elif kind == "order":
        header[name] = header.pop(name)
    elif kind == "extra":
        entry[draw(st.text(max_size=6))] = draw(JUNK)
    else:
        header["__metadata__"] = draw(JUNK | st.dictionaries(st.text(max_size=4), st.text(max_size=4)))


def mutate_bytes(draw: st.DrawFn, raw: bytes, focus: int) -> bytes:
    """Some bytes changed, inserted, cut or repeated, mostly among the first `focus`."""
    kind = draw(st.sampled_from(("set", "insert", "cut", "truncate", "append", "repeat", "length")))
    at = draw(st.integers(0, min(focus, len(raw))) | st.integers(0, len(raw)))
    end = min(at + draw(st.integers(1, 16)), len(raw))
    if kind == "set":
        return raw[:at] + draw(st.binary(min_size=end - at, max_size=end - at)) + raw[end:]
    if kind == "insert":
        return raw[:at] + draw(FRAGMENTS) + raw[at:]
    if kind == "cut":
        return raw[:at] + raw[end:]
    if kind == "truncate":
        return raw[:at]
    if kind == "append":
        return raw + draw(st.binary(min_size=1, max_size=9))
    if kind == "repeat":
        return raw[:end] + raw[at:]
    return draw(st.integers(0, 2**64 - 1) | st.integers(0, 2 * focus)).to_bytes(8, "little") + raw[8:]


def dump(value: Any) -> bytes:
    """JSON as an attacker may write it: lone surrogates and NaN included."""
    return json.dumps(value, ensure_ascii=True).encode()
