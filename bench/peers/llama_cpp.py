"""llama.cpp's MXFP4 products, timed by its own test-backend-ops, and ours on the same shapes, in turn.

    python bench/peers/llama_cpp.py --dir /tmp/llama --save llama.json

Fetches the sources inside llama-cpp-python's archive into --dir, builds what is needed there, once, and measures. What
is compared, and what the peer's tool does differently from us, is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ratios import environment, neighbour, numbers, ratio, save, table
from torch import Tensor

from microscale.activations import Activation
from microscale.backends import cpu, cpu_core
from microscale.bench.ceilings import Ceilings, Probe
from microscale.bench.layers import random_weight, routes
from microscale.env import CPU_LEVELS
from microscale.formats import FORMATS
from microscale.machine import cache_bytes, detect

PACKAGE = "llama-cpp-python"
TARGET = "test-backend-ops"
SECONDS = 0.5  # of our calls, in each round
REPEATED_FLOPS = 8e9  # the tool repeats one draw of routes for so many FLOPs
# The tool's list of tokens for gpt-oss-20b, and ours in its place: the only change to its sources.
HIS_ROWS = "    // gpt-oss-20b\n    for (int bs : {1, 4, 8, 512}) {"
OUR_ROWS = "    // gpt-oss-20b\n    for (int bs : {1, 4, 8, 32, 128, 512}) {"
LINE = re.compile(r"(MUL_MAT\w*)\((.*?)\):\s+(\d+) runs -\s+([\d.]+) us/run")


@dataclass(frozen=True)
class Product:
    """A case of the tool: `m` outputs, `n` tokens, `k` inputs, and for MUL_MAT_ID the matrices there and used."""

    op: str
    m: int
    n: int
    k: int
    mats: int = 1
    used: int = 1

    @property
    def filter(self) -> str:
        """Parameters that only this case has."""
        mats = f"n_mats={self.mats},n_used={self.used},b=0," if self.op == "MUL_MAT_ID" else ""
        return f"^type_a=mxfp4,type_b=f32,{mats}m={self.m},n={self.n},k={self.k},"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k * self.used

    @property
    def hit(self) -> float:
        """Matrices that random routes are expected to use."""
        return self.mats * (1 - (1 - self.used / self.mats) ** self.n)

    @property
    def bytes(self) -> float:
        """Codes and scales of these."""
        return self.hit * self.m * self.k * FORMATS["mxfp4"].bits_per_weight / 8


def command(*words: str | Path) -> None:
    """Run at low priority, with its output on stderr.

    Raises:
        SystemExit: it fails.
    """
    line = ["nice", "-n", "10", *map(str, words)]
    if subprocess.run(line, stdout=sys.stderr, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(line)}")


def build(directory: Path, version: str, jobs: int) -> Path:
    """The tool, built in `directory` unless it is there already.

    Raises:
        SystemExit: the sources cannot be had or built, or are not as expected.
    """
    tool = directory / "build" / "bin" / TARGET
    if tool.is_file():
        return tool
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{PACKAGE.replace('-', '_')}-{version}"
    archive = directory / f"{name}.tar.gz"
    if not archive.is_file():
        fetch = ("--no-deps", "--no-binary", PACKAGE, "-d", directory, f"{PACKAGE}=={version}")
        command(sys.executable, "-m", "pip", "download", *fetch)
    sources = directory / name / "vendor" / "llama.cpp"
    if not sources.is_dir():
        with tarfile.open(archive) as tar:
            tar.extractall(directory, filter="data")
    file = sources / "tests" / f"{TARGET}.cpp"
    text = file.read_text()
    if OUR_ROWS not in text:
        if text.count(HIS_ROWS) != 1:
            raise SystemExit(
                f"{file}: not the sources this script knows; its cases for gpt-oss-20b are not found"
            )
        file.write_text(text.replace(HIS_ROWS, OUR_ROWS))
    off = ("TOOLS", "EXAMPLES", "SERVER", "APP")
    options = [
        *(f"-DLLAMA_BUILD_{word}=OFF" for word in off),
        "-DLLAMA_BUILD_TESTS=ON",
        "-DLLAMA_OPENSSL=OFF",
    ]
    options += ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON"]
    command("cmake", "-S", sources, "-B", directory / "build", *options)
    command("cmake", "--build", directory / "build", "--target", TARGET, "-j", str(jobs))
    return tool


def peer_seconds(tool: Path, product: Product) -> float:
    """Of one product, the mean of the tool's one second.

    Raises:
        SystemExit: it fails, or prints no line for this case.
    """
    words = [str(tool), "perf", "-b", "CPU", "-o", product.op, "-p", product.filter]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = LINE.findall(done.stdout)
    if done.returncode or len(lines) != 1:
        raise SystemExit(f"{' '.join(words)}: {len(lines)} cases; {done.stdout[-500:]}{done.stderr[-500:]}")
    return float(lines[0][3]) / 1e6


class Ours:
    """The same product by our kernels.

    MUL_MAT_ID is the first half of our MoE: w13 has the product's shape and no gate, and behind it w2 has 16 rows only,
    which is half a hundredth of the work more.
    """

    def __init__(self, product: Product, generator: torch.Generator) -> None:
        self.product, self.generator = product, generator
        lead = (product.mats,) if product.op == "MUL_MAT_ID" else ()
        fmt = FORMATS["mxfp4"]
        self.w13 = cpu.pack(random_weight(fmt, (*lead, product.m, product.k), generator))
        self.w2 = cpu.pack(random_weight(fmt, (*lead, 16, product.m), generator)) if lead else None

    def at(self, n: int) -> Callable[[], Callable[[], Tensor]]:
        """What draws activations and routes for `n` tokens, and gives what multiplies with them."""
        p, generator = self.product, self.generator

        def draw() -> Callable[[], Tensor]:
            x = torch.randn(n, p.k, generator=generator).to(torch.bfloat16)
            if self.w2 is None:
                return lambda: cpu.linear(x, self.w13)
            ids, weights = routes(n, p.mats, p.used, generator)
            buffers = (self.w13.buffer, None, self.w2.buffer, None)
            plain = Activation("relu2", gated=False)
            return lambda: cpu_core.moe(x, ids, weights, *buffers, p.mats, 16, plain, None, None, None, False)

        return draw


def our_seconds(draw: Callable[[], Callable[[], Tensor]], runs: int) -> float:
    """Of one product: `runs` of them on one draw, then another draw, until enough time has passed; their mean."""
    draw()()
    spent, count = 0.0, 0
    while spent < SECONDS:
        run = draw()
        start = time.perf_counter()
        for _ in range(runs):
            run()
        spent += time.perf_counter() - start
        count += runs
    return spent / count


def compare(
    tool: Path, products: list[Product], probe: Probe, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """All products, the peer's process and our calls in turn."""
    generator = torch.Generator().manual_seed(args.seed)
    found: list[dict[str, Any]] = []
    ours: Ours | None = None
    for product in products:
        if ours is None or ours.product.op != product.op:
            ours = Ours(product, generator)
        draw, first = ours.at(product.n), len(probe.reads)
        runs = int(REPEATED_FLOPS // product.flops) + 1  # as the tool counts them
        times: dict[str, list[float]] = {"peer": [], "ours": [], "ours_fresh": []}
        for _ in range(args.rounds):
            probe.once()
            times["peer"].append(peer_seconds(tool, product))
            times["ours"].append(our_seconds(draw, runs))
            times["ours_fresh"].append(our_seconds(draw, 1))
        found.append(case(product, times, probe.since(first)))
    return found


def case(product: Product, times: dict[str, list[float]], ceilings: Ceilings) -> dict[str, Any]:
    """One case for JSON."""
    floor = ceilings.floor(product.bytes, product.flops)
    by_median, by_min = ratio(times["peer"], times["ours"])
    shape = {"op": product.op, "n_mats": product.mats, "n_used": product.used}
    shape |= {"m": product.m, "n": product.n, "k": product.k}
    rates = {
        "ceiling_read_rate": ceilings.read,
        "ceiling_flop_rate": ceilings.multiply,
        "floor_seconds": floor,
    }
    ratios = {"ratio_median": by_median, "ratio_min": by_min}
    ratios["ratio_fresh_median"] = ratio(times["peer"], times["ours_fresh"])[0]
    return shape | rates | ratios | {f"{who}_seconds": seconds for who, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="where sources and build lie; 2 GB")
    parser.add_argument("--version", default="0.3.36", help=f"of {PACKAGE}")
    parser.add_argument("--jobs", type=int, default=2, help="of the build")
    parser.add_argument("--m", type=numbers, default=[1, 4, 8, 32, 128, 512], help="tokens in a MUL_MAT_ID")
    parser.add_argument(
        "--linear-m", type=numbers, default=[1, 4, 8, 512], help="tokens in a MUL_MAT; 0: none"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of peer and ours in turn")
    parser.add_argument(
        "--busy", action="store_true", help="with an unrelated process on one of the processors"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write a JSON document here")
    args = parser.parse_args()

    tool = build(args.dir.absolute(), args.version, args.jobs)
    # The tool takes one thread for each processor that it may use; so do we.
    threads, level = len(os.sched_getaffinity(0)), CPU_LEVELS[cpu_core.level()]
    torch.set_num_threads(threads)
    probe = Probe(level, threads, cache_bytes() or 256 << 20, detect().memory)
    products = [Product("MUL_MAT_ID", 2880, n, 2880, 32, 4) for n in args.m if n]
    products += [Product("MUL_MAT", 4096, n, 14336) for n in args.linear_m if n]
    with neighbour(args.busy), torch.inference_mode():
        cases = compare(tool, products, probe, args)
    head = (
        "op",
        "M",
        "peer ms",
        "ours ms",
        "peer/ours",
        "by minimum",
        "ours, fresh routes ms",
        "peer/ours",
        "of floor",
    )
    rows = [
        (
            c["op"],
            str(c["n"]),
            *(f"{1e3 * median(c[f'{who}_seconds']):.3g}" for who in ("peer", "ours")),
            f"{c['ratio_median']:.2f}",
            f"{c['ratio_min']:.2f}",
            f"{1e3 * median(c['ours_fresh_seconds']):.3g}",
            f"{c['ratio_fresh_median']:.2f}",
            f"{c['floor_seconds'] / median(c['ours_fresh_seconds']):.2f}",
        )
        for c in cases
    ]
    print(
        f"{detect().cpu}, {threads} threads, our level {level}; {PACKAGE} {args.version}; busy: {args.busy}"
    )
    print(table([head, *rows]))
    document = environment("llama.cpp", f"{PACKAGE} {args.version}", threads, args.busy)
    save(args.save, document | {"cases": cases})


if __name__ == "__main__":
    main()
