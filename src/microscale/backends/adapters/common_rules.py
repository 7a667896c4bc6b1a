"""What rules files have in common: a package's version, a GPU's number, multiples that sizes must be."""

from __future__ import annotations

import math
import re

from microscale.formats import FORMATS
from microscale.machine import READ
from microscale.oracle import Problem


def missing(problem: Problem, package: str) -> str | None:
    """None, or why the package cannot be used: absent, or of another version than those that were read."""
    if package not in problem.packages:
        return f"the package {package} is not installed"
    found, least = problem.version(package), READ[package]
    series = numbers(least)[:2]
    if found and not (numbers(found) >= numbers(least) and numbers(found)[:2] == series):
        wanted = f"at least {least} and below {series[0]}.{series[1] + 1}"
        return f"{package} {found} is installed, and the interface that was read is that of {wanted}"
    return None


def not_as_bf16(problem: Problem) -> str | None:
    """None, or why quantised activations are no bf16 numbers, which would be multiplied exactly: `operands.as_bf16`."""
    if problem.act != "a16" and (problem.act not in FORMATS or FORMATS[problem.act].scale != "e8m0"):
        return f"activations are multiplied as bf16 numbers, which do not hold those of {problem.act}"
    return None


def capability(arch: str) -> int:
    """ "sm_90" -> 90, "sm_100a" -> 100; 0 for anything else."""
    match = re.fullmatch(r"sm_(\d+)[af]?", arch)
    return int(match[1]) if match else 0


def sizes(problem: Problem, rows: int, columns: int) -> str | None:
    """None, or which size is no multiple of what products [M, K] x [N, K] need: N of `rows`, K of `columns`."""
    if problem.op == "linear":
        steps = [("N", problem.n, rows), ("K", problem.k, columns)]
    else:
        both = math.lcm(rows, columns)
        steps = [("H", problem.k, both), ("I", problem.intermediate, both)]
    for name, size, step in steps:
        if size % step:
            return f"{name} must be a multiple of {step}, and it is {size}"
    return None


def numbers(version: str) -> tuple[int, ...]:
    """The release's numbers: "0.1.7.post2.dev18" -> (0, 1, 7)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = tuple(int(n) for n in match[0].split(".")) if match else ()
    return (*numbers, 0, 0)[: max(len(numbers), 2)]
