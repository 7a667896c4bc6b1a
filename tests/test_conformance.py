"""Every backend of the table on every case of the suite; a refusal is a skip with the backend's own sentence."""

from __future__ import annotations

import pytest
import torch

from microscale.backends import BACKENDS, load
from microscale.conformance import Case, cases, run
from microscale.machine import detect
from microscale.oracle import Backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("case", list(cases()), ids=lambda c: c.name)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_backend_is_within_the_kernel_error_budget(backend: Backend, case: Case, seed: int) -> None:
    problem = case.problem(detect(), DEVICE)
    why = backend.refuse(problem)
    if why is not None:
        pytest.skip(why)
    how = backend.accumulation(problem)
    worst = run(case, load(backend), DEVICE, torch.Generator().manual_seed(seed), how)
    assert worst <= 1.0, f"error is {worst:.3g} times the permitted one"
