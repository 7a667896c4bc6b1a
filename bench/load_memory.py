"""Peak memory of loading a checkpoint: `python bench/load_memory.py --dir /tmp`.

Writes gpt-oss-20b cut to a few layers with random weights (5 GB for 6), loads it in fresh processes, and removes it.
The promise: peak memory is at most 1.15 times the checkpoint plus 512 MiB, and it is checked here: exit status 1.
Linux: reads /proc.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RATIO, CONSTANT = 1.15, 512 << 20
PERIOD = 0.02  # seconds between two looks at RssAnon
WAYS = ("imports", "microscale.load", "from_pretrained")


def write_checkpoint(directory: Path, name: str, layers: int) -> None:
    """Random weights in a config's true shapes; all tensors of a kind are views of one buffer, to save memory."""
    import torch

    from microscale.checkpoints import read_config, write
    from microscale.integrations.hf.dummy import dummy_config, meta_model
    from microscale.models import resolve

    path = resolve(name)
    config = dummy_config(path, read_config(path), layers)
    parameters = dict(meta_model(config).named_parameters())
    fill: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "scales": lambda t: t.random_(117, 122),  # 2^-10 .. 2^-6
        "codes": lambda t: t.random_(0, 256),
        "norms": lambda t: t.fill_(1.0),
        "numbers": lambda t: t.normal_(0.0, 0.02),
    }

    def kind(tensor: str, p: torch.Tensor) -> str:
        if p.dtype == torch.uint8:
            return "scales" if tensor.endswith("_scales") else "codes"
        return "norms" if p.dim() < 2 and tensor.endswith("weight") else "numbers"

    largest: dict[str, torch.Tensor] = {}
    for n, p in parameters.items():
        if kind(n, p) not in largest or p.numel() > largest[kind(n, p)].numel():
            largest[kind(n, p)] = p
    buffers = {k: fill[k](torch.empty(p.numel(), dtype=p.dtype)) for k, p in largest.items()}
    state = {n: buffers[kind(n, p)][: p.numel()].view(p.shape) for n, p in parameters.items()}
    write(directory, {**config.to_dict(), "architectures": ["GptOssForCausalLM"]}, state)


def status(key: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}")


class AnonymousPeak(threading.Thread):
    """Largest RssAnon seen: memory that no file backs, which the system cannot take back without swapping."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(PERIOD):
            self.peak = max(self.peak, status("RssAnon"))


class PackingTime:
    """Seconds in `cpu_core.pack` from now on: what the layout costs, pages that come in on the way included."""

    def __init__(self) -> None:
        from microscale.machine import detect

        self.seconds = 0.0
        if not detect().core:
            return
        from microscale.backends import cpu_core

        pack = cpu_core.pack

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            packed = pack(*args)
            self.seconds += time.perf_counter() - started
            return packed

        cpu_core.pack = timed


def measure(way: str, path: str, backend: str | None, tokens: int) -> dict[str, Any]:
    """Load in this process, then run a few tokens, so that no weight is left unread."""
    watch = AnonymousPeak()
    watch.start()
    import torch
    import transformers
    import transformers.models.gpt_oss.modeling_gpt_oss

    import microscale
    import microscale.backends.emulation
    import microscale.integrations.hf.loading
    import microscale.integrations.hf.quantizer

    transformers.utils.logging.disable_progress_bar()
    packing = PackingTime()
    started = time.perf_counter()
    if way == "microscale.load":
        model = microscale.load(path, device="cpu", backend=backend)
    elif way == "from_pretrained":
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {"seconds": seconds, "peak": status("VmHWM"), "resident": status("VmRSS")}
    found["packing_seconds"] = packing.seconds
    if way != "imports":
        with torch.inference_mode():
            logits = model(input_ids=torch.arange(tokens)[None], use_cache=False).logits
        assert bool(torch.isfinite(logits).all())
    watch.stop.set()
    watch.join()
    anonymous = max(watch.peak, status("RssAnon"))
    return found | {"peak_with_forward": status("VmHWM"), "anonymous": anonymous}


def read_files(path: Path) -> float:
    """Seconds to read every file from the page cache once: what loading can at best take."""
    buffer = memoryview(bytearray(16 << 20))
    seconds = 0.0
    for _ in range(2):  # the first time may come from the disk
        started = time.perf_counter()
        for file in path.iterdir():
            with open(file, "rb", buffering=0) as source:
                while source.readinto(buffer):
                    pass
        seconds = time.perf_counter() - started
    return seconds


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Peaks are a process's own: nothing before may have raised them."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def table(size: int, read: float, results: dict[str, dict[str, Any]]) -> str:
    """One line for each way; GB are 1e9 bytes."""
    lines = [
        f"checkpoint: {size / 1e9:.3f} GB; the bound is {bound(size) / 1e9:.3f} GB; "
        f"reading it from the page cache takes {read:.2f} s",
        f"{'':16} {'seconds':>8} {'packing':>8} {'/ read':>7} {'peak GB':>8} {'/ size':>7} "
        f"{'after a forward':>15} {'anonymous':>10}  within",
    ]
    for way, r in results.items():
        within = "" if way == WAYS[0] else "yes" if r["peak_with_forward"] <= bound(size) else "NO"
        lines.append(
            f"{way:16} {r['seconds']:8.2f} {r['packing_seconds']:8.2f} {r['packing_seconds'] / read:7.2f} "
            f"{r['peak'] / 1e9:8.3f} {r['peak'] / size:7.3f} "
            f"{r['peak_with_forward'] / 1e9:15.3f} {r['anonymous'] / 1e9:10.3f}  {within}"
        )
    return "\n".join(lines)


def bound(size: int) -> float:
    """Bytes that loading a checkpoint of `size` bytes may take at its peak."""
    return RATIO * size + CONSTANT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", type=Path, help="where the checkpoint lies for the while; default: the temp directory"
    )
    parser.add_argument("--model", default="gpt-oss-20b", help="a bundled config")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--backend", help="the only backend allowed")
    parser.add_argument("--tokens", type=int, default=16, help="of the forward pass after loading")
    parser.add_argument("--json", action="store_true", help="JSON alone")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.dir, prefix="load_memory.") as directory:
        path = Path(directory) / "checkpoint"
        in_fresh_process(write_checkpoint, path, args.model, args.layers)
        size = sum(f.stat().st_size for f in path.iterdir())
        read = in_fresh_process(read_files, path)
        results = {way: in_fresh_process(measure, way, str(path), args.backend, args.tokens) for way in WAYS}

    versions = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    record = {
        "bytes": size,
        "bound": bound(size),
        "read_seconds": read,
        "results": results,
        "versions": versions,
    }
    if not args.json:
        print(table(size, read, results))
    print(json.dumps(record | {"machine": platform.platform(), "layers": args.layers, "model": args.model}))
    if any(results[way]["peak_with_forward"] > bound(size) for way in WAYS[1:]):
        sys.exit(1)


if __name__ == "__main__":
    main()
