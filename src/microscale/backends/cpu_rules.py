"""When the C++ core can run a problem. Apart from the core, which is imported only once it is chosen."""

from __future__ import annotations

from microscale.formats import FORMATS
from microscale.machine import CORE
from microscale.oracle import Problem


def refuse_device(device: str, core: bool) -> str | None:
    """Why the core cannot run anything there, or None. `core`: it is in the installation."""
    if device != "cpu":
        return f"the C++ core runs on the CPU, not on {device}"
    if not core:
        return "the C++ core is not in this installation (`microscale doctor` says why)"
    return None


def refuse(problem: Problem) -> str | None:
    """None, or why not."""
    if (why := refuse_device(problem.device, CORE in problem.packages)) is not None:
        return why
    if problem.weight not in FORMATS:
        return f"the C++ core has no layout for weights in {problem.weight}"
    return None
