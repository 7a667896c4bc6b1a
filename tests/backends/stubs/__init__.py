"""Stand-ins for other packages' kernels, on any device: the same names, signatures, checks and layouts; slow products.

Each was written from the sources that its docstring names. A stub refuses what the package refuses, and computes in
float64 from the layout it was given, so that a wrong layout, shape or argument cannot give the right numbers.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    """Make `import name` give a module of these contents, and its parents if they are not there."""
    module = ModuleType(name)
    module.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, leaf = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            install(monkeypatch, parent, __path__=[])
        monkeypatch.setattr(sys.modules[parent], leaf, module, raising=False)
    return module


def check(condition: bool, message: str) -> None:
    """What the package's own check would say."""
    if not condition:
        raise AssertionError(f"stub: {message}")
