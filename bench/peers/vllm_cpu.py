"""MXFP4 mixture-of-experts layers on vLLM's CPU operator and on ours, in turn, in one process.

    python bench/peers/vllm_cpu.py --shape gpt-oss-20b,qwen3-30b-a3b --save vllm.json

README.md beside this file says how to set up the environment. Both get the same operands and must agree.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ratios import environment, neighbour, numbers, ratio, save, table
from torch import Tensor

from microscale.backends import cpu, cpu_core
from microscale.bench.ceilings import Probe
from microscale.bench.layers import Call, Layers
from microscale.bench.shapes import Shape, parse_shape
from microscale.bench.timing import measure
from microscale.env import CPU_LEVELS
from microscale.formats import FORMATS
from microscale.machine import cache_bytes, detect

MXFP4 = 4  # the operator's number of the method
PAUSE = 0.010  # seconds in front of each call: one pool's threads spin for some milliseconds after their last
AGREE = 0.02  # relative error; two kernels that round to bfloat16 at different places differ by some 0.005


def load() -> str:
    """Register the operators of vLLM's library without importing vLLM itself; its version.

    Raises:
        SystemExit: it is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    places = spec.submodule_search_locations if spec is not None else None
    library = Path(places[0]) / "_C.abi3.so" if places else None
    if library is None or not library.is_file():
        raise SystemExit(
            "vllm-cpu is not in this environment; bench/peers/README.md has the lines that install it"
        )
    torch.ops.load_library(str(library))
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


class Peer:
    """The peer's copies of our layers, in its own layout."""

    def __init__(self, layers: Layers) -> None:
        self.shape = layers.shape
        first = [self._convert(p) for p in layers.packed[0]]
        rest = ([(c.clone(), s.clone()) for c, s in first] for _ in layers.packed[1:])
        self.weights = [first, *rest]
        self.biases = [None if b is None else b.float().contiguous() for b in layers.biases]

    @staticmethod
    def _convert(packed: Any) -> tuple[Tensor, Tensor]:
        w = cpu.unpack(packed)
        convert = torch.ops._C
        return convert.convert_weight_packed(w.codes), convert.convert_scale_packed(w.scales)

    def call(self, ours: Call) -> Call:
        """The same call on the peer's operator."""
        assert ours.routes is not None
        assert self.shape.activation is not None
        (w13, s13), (w2, s2) = self.weights[ours.layer]
        ids, weights = ours.routes
        ids32, weights32 = ids.to(torch.int32), weights.float()
        activation = self.shape.activation
        oai = activation.kind == "swiglu_oai"
        alpha, limit = (activation.alpha, activation.limit) if oai else (None, None)
        out = torch.empty(len(ours.x), self.shape.n, dtype=ours.x.dtype)
        operands = (out, ours.x, w13, w2, weights32, ids32, MXFP4, s13, s2, None, None, None, None)

        def run() -> Tensor:
            torch.ops._C.fused_experts_cpu(*operands, *self.biases, alpha, limit, True)
            return out

        return Call(run, ours.bytes, ours.flops, ours.layer, ours.x, ours.routes)


def difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, Euclidean."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def compare(shape: Shape, rows: list[int], probe: Probe, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One shape, at each number of tokens."""
    generator = torch.Generator().manual_seed(args.seed)
    memory = detect().memory // 4
    layers = Layers(shape, FORMATS["mxfp4"], probe.cache, memory, generator)
    peer, found = Peer(layers), []
    for m in rows:
        call = layers.call(m)
        error = difference(call.run(), peer.call(call).run())
        if not error < AGREE:
            raise SystemExit(f"{shape.name}, M={m}: the two results differ by {error:.3g} of their size")

        def theirs(m: int = m) -> Call:
            return peer.call(layers.call(m))

        kinds = (partial(layers.call, m), theirs)
        our_times, peer_times = measure(kinds, probe, args.repeat, pause=PAUSE)
        by_median, by_min = ratio(list(peer_times.seconds), list(our_times.seconds))
        found.append(
            {
                "shape": shape.name,
                "m": m,
                "relative_error": error,
                "ratio_median": by_median,
                "ratio_min": by_min,
                "ours": our_times.document(),
                "peer": peer_times.document(),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", default="gpt-oss-20b,qwen3-30b-a3b", help="MoE shapes, with commas between"
    )
    parser.add_argument("--m", type=numbers, default=[1, 4, 16, 64, 256, 1024], help="tokens in a call")
    parser.add_argument("--threads", type=int, help="of both; as many as torch takes if left out")
    parser.add_argument("--repeat", type=int, default=15, help="timings of each")
    parser.add_argument(
        "--busy", action="store_true", help="with an unrelated process on one of the processors"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write a JSON document here")
    args = parser.parse_args()

    shapes = [parse_shape(word) for word in args.shape.split(",")]
    if any(s.op != "moe" for s in shapes):
        raise SystemExit("the peer has no linear in MXFP4: --shape takes MoE shapes")
    if detect().level != "amx":
        print(
            f"vLLM's fused_experts_cpu needs AMX for MXFP4, and this CPU has {detect().level}: nothing is compared"
        )
        sys.exit(0)
    version = load()
    if args.threads:
        torch.set_num_threads(args.threads)
    threads, level = torch.get_num_threads(), CPU_LEVELS[cpu_core.level()]
    probe = Probe(level, threads, cache_bytes() or 256 << 20, detect().memory)
    with neighbour(args.busy), torch.inference_mode():
        cases = [case for shape in shapes for case in compare(shape, args.m, probe, args)]
    head = (
        "shape",
        "M",
        "ours ms",
        "peer ms",
        "peer/ours",
        "by minimum",
        "ours of floor",
        "peer of floor",
        "error",
    )
    rows = [
        (
            c["shape"],
            str(c["m"]),
            f"{1e3 * c['ours']['seconds_median']:.3g}",
            f"{1e3 * c['peer']['seconds_median']:.3g}",
            f"{c['ratio_median']:.2f}",
            f"{c['ratio_min']:.2f}",
            f"{c['ours']['of_floor']:.2f}",
            f"{c['peer']['of_floor']:.2f}",
            f"{c['relative_error']:.4f}",
        )
        for c in cases
    ]
    print(
        f"{detect().cpu}, {threads} threads, our level {level}; vLLM {version}; busy neighbour: {args.busy}"
    )
    print(table([head, *rows]))
    save(args.save, environment("vllm-cpu", version, threads, args.busy) | {"cases": cases})


if __name__ == "__main__":
    main()
