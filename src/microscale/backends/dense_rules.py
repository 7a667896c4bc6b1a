"""Linears whose weights are not quantised: when the C++ core or Triton multiplies them, and who does otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from microscale import env, machine
from microscale.backends.cpu_rules import refuse_device
from microscale.backends.triton_rules import refuse_steps
from microscale.oracle import Backend, Choice, Problem, choose

# What a `Problem` calls the weights of such a linear.
WEIGHTS = ("bf16", "fp16", "fp32")
HOST = "transformers"  # what runs whatever we do not


def refuse(problem: Problem) -> str | None:
    """Why the C++ core does not run this linear, or None."""
    if (why := refuse_device(problem.device, machine.CORE in problem.packages)) is not None:
        return why
    if problem.weight not in WEIGHTS:
        return f"the core has no product for weights in {problem.weight}"
    if problem.dtype != problem.weight:
        return f"activations are {problem.dtype} and weights {problem.weight}"
    if problem.arch not in ("avx2", "avx512", "avx512_bf16", "amx"):
        return f"its wide kernels are for x86 with AVX2 or more, and the level here is {problem.arch or 'unknown'}"
    return None


def _refuse_nothing(problem: Problem) -> str | None:
    return None


CORE = Backend(
    "cpu",
    "microscale.backends.cpu_core",
    refuse,
    "the C++ core: up to 8 rows by weights where they lie, summed in float32; more rows, and training, are PyTorch's",
    proven="x86 CPUs",
)
DENSE = (CORE, Backend(HOST, "torch.nn.functional", _refuse_nothing, "PyTorch's own product"))


_WHOLE = 16  # bytes of a row that Triton's kernel for few rows reads at once
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def refuse_token(problem: Problem) -> str | None:
    """Why a generated token's product is not Triton's, in a chain of kernels (`chain_parts`: of which models)."""
    if (why := refuse_steps(problem.device, problem.arch, problem.packages)) is not None:
        return why
    if problem.dtype != problem.weight:
        return f"activations are {problem.dtype} and weights {problem.weight}"
    if problem.k * _BYTES[problem.weight] % _WHOLE:
        return f"its rows of {problem.k} are no whole {_WHOLE} bytes"
    return None


TOKEN = Backend(
    "triton",
    "microscale.backends.triton.rows",
    refuse_token,
    "up to 4 rows by weights where they lie, summed in float32, several linears in one kernel",
    proven="NVIDIA H200",
)


def choose_dense(
    problem: Problem, force: str | None = None, failed: Sequence[tuple[str, str]] = ()
) -> Choice:
    """The oracle's answer for a linear whose weights are not quantised. Something always runs it.

    Args:
        force: the only backend allowed; any other than the C++ core leaves the layer to its host.
        failed: as in `oracle.choose`.
    """
    against = dict(failed)
    if force not in (None, CORE.name):
        against.setdefault(CORE.name, f"not the forced one ({force})")
    if not env.dense():
        against.setdefault(CORE.name, "MICROSCALE_DENSE=off")
    return choose(problem, DENSE, failed=tuple(against.items()))
