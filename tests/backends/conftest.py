"""The C++ core at each of its levels; Triton, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from microscale import env
from microscale.backends.triton_rules import refuse
from microscale.errors import SettingError
from microscale.machine import detect
from microscale.oracle import Problem


@pytest.fixture
def cpu() -> Any:
    """The backend's module; where the core is absent, a skip that says why."""
    if not detect().core:
        pytest.skip(f"the C++ core is not in this installation: {detect().core_missing}")
    return import_module("microscale.backends.cpu")


@pytest.fixture(params=env.CPU_LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cpu: Any) -> str:
    """Each level, in force for the test; one that this machine lacks is a skip with the core's own sentence."""
    monkeypatch.setenv("MICROSCALE_CPU_LEVEL", request.param)
    try:
        cpu.cpu_core.level()
    except SettingError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Any]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def layout() -> Any:
    pytest.importorskip("triton", reason=str(refuse(Problem("linear", "mxfp4", 1, 1, device="rocm"))))
    from microscale.backends.triton import layout

    return layout
