"""When a generated token is one call of the C++ core: on which machines, and with layers that who runs."""

from __future__ import annotations

from microscale.backends.dense_rules import CORE, HOST


def refuse_layer(layer: str, backend: str | None, act: str) -> str | None:
    """None, or why a layer cannot be a step of that call.

    Args:
        layer: in words: "a Linear in it", "its experts".
        backend: what runs it in the model; None: nothing does.
        act: the oracle's word for how its activations are stored.
    """
    if backend == HOST:
        return f"{layer} is PyTorch's"
    if backend != CORE.name:
        return f"{layer} by {backend or 'no backend'}, not by the core"
    if act != "a16":
        return f"activations are quantised to {act}"
    return None
