"""Our kernels beside another package's, timed in one run: what their order in the table rests on.

The figures are those of docs/benchmarks-gpu.md: `bench/gpu_kernels.py --peers humming` makes both.
"""

from __future__ import annotations

from microscale.oracle import Problem

_WHERE = "timed beside humming on an NVIDIA H200"
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
# (N, K), or (experts, top-k, H, I) -> how many times as long humming takes as `triton`, for each of TOKENS.
# MXFP4 weights, bfloat16 activations, NVIDIA H200, humming-kernels 0.1.19.
HUMMING: dict[tuple[int, ...], tuple[float, ...]] = {
    (32, 4, 2880, 2880): (2.18, 1.76, 1.82, 1.88, 1.70, 1.51, 1.33),
    (128, 4, 2880, 2880): (2.20, 1.83, 1.69, 1.64, 1.74, 1.68, 1.39),
    (128, 8, 2048, 768): (2.19, 1.85, 1.77, 1.66, 1.48, 1.47, 1.28),
    (8192, 8192): (1.23, 1.37, 1.39, 1.41, 1.23, 1.17, 1.09),
    (5120, 2880): (1.43, 1.54, 1.44, 1.59, 1.53, 1.29, 1.17),
}


def beside_humming(problem: Problem) -> str | None:
    """How `triton` and humming compare in a problem, in a sentence; None: nothing like it was measured."""
    like = (problem.weight, problem.act, problem.dtype, problem.device, problem.arch)
    if like != ("mxfp4", "a16", "bf16", "cuda", "sm_90"):
        return None
    if problem.op == "moe":
        shape: tuple[int, ...] = (problem.experts, problem.top_k, problem.n, problem.intermediate)
    else:
        shape = (problem.n, problem.k)
    ratios = HUMMING.get(shape)
    if ratios is None:
        other = [r for key, known in HUMMING.items() if len(key) == len(shape) for r in known]
        return f"{_WHERE}, but not in this shape: in others humming took {_range(other)} times as long"
    faster = {m: r for m, r in zip(TOKENS, ratios, strict=True) if r < 1}
    if not faster:
        return (
            f"{_WHERE}: humming took {_range(ratios)} times as long, for {TOKENS[0]} to {TOKENS[-1]} tokens"
        )
    slower, where = [r for r in ratios if r >= 1], " and ".join(map(str, faster))
    return (
        f"{_WHERE}: humming took {_range(slower)} times as long, but {_range([*faster.values()])} times for {where} "
        "tokens; how many will come is not known when a layer is placed"
    )


def _range(ratios: tuple[float, ...] | list[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"
