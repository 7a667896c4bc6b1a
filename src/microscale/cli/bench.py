"""`microscale bench`: how fast kernels are here, and what fraction that is of what the machine could do."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microscale.cli.output import SEED
from microscale.errors import MicroscaleError, brief

if TYPE_CHECKING:
    from microscale.bench.ceilings import Probe
    from microscale.bench.shapes import Shape
    from microscale.bench.timing import Times

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure speed, as a fraction of what the machine can do.",
    add_completion=False,
)
ROWS = (1, 4, 16, 64, 256, 1024)
QUICK_ROWS, QUICK_REPEAT = (1, 32, 512), 5
MAX_THREADS = 1024  # of the C++ core's pool
DENSE = ("bf16", "fp16")  # weights of linears that are not packed


@bench.callback()
def _group() -> None:
    """What `bench` by itself prints."""


@bench.command()
def kernels(
    shape: Annotated[
        str,
        typer.Option(
            help="Layers, with commas between: names (gpt-oss-20b, qwen3-30b-a3b, 2880x2880, 5120x2880, 4096x4096), "
            "NxK (linear: outputs x inputs), ExTxHxI (MoE: experts x top-k x hidden x intermediate); all: the names."
        ),
    ] = "all",
    format: Annotated[
        str,
        typer.Option(
            help="Formats, with commas between; all. Also bf16 and fp16: linears whose weights are not packed."
        ),
    ] = "all",
    op: Annotated[str, typer.Option(help="Of the shapes, only linear, or only moe; all.")] = "all",
    m: Annotated[
        str | None,
        typer.Option("--m", help="Tokens in a call, with commas between; default 1,4,16,64,256,1024."),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(help="Instruction sets, with commas between; all; the widest here if left out."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_THREADS, help="Threads; as many as torch takes if left out."),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            min=1, help="Timings of each case, by default 15; long cases take fewer, but 5 at the least."
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="mxfp4, M 1, 32 and 512, and 5 timings, but for what is given."),
    ] = False,
    seed: Annotated[int, typer.Option(**SEED, help="Of weights, activations and routes.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw a roofline into this PNG file.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the JSON document into this file, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time the C++ core's kernels beside what this machine can read and multiply, measured in the same moments.

    microscale bench kernels --quick --shape gpt-oss-20b --plot roofline.png
    """
    from microscale.bench.roofline import check_matplotlib
    from microscale.bench.shapes import SHAPES, parse_shape
    from microscale.cli.files import check_writable, write_file
    from microscale.cli.output import emit, known
    from microscale.formats import FORMATS
    from microscale.machine import detect

    machine = detect()
    if not machine.core:
        raise MicroscaleError(f"the C++ core is not in this installation: {machine.core_missing}")
    known(op, ("linear", "moe", "all"), "op")
    names = ["mxfp4" if quick else "all"] if format == "all" else _words(format)
    formats = list(FORMATS) if names == ["all"] else [known(n, (*FORMATS, *DENSE), "format") for n in names]
    shapes = [parse_shape(word) for word in (SHAPES if shape == "all" else _words(shape))]
    if not formats or not shapes:
        raise MicroscaleError("--shape and --format: no " + ("format" if shapes else "shape") + " is given")
    shapes = [s for s in shapes if op in ("all", s.op)]
    if not shapes:
        raise MicroscaleError(f"--op {op}: no shape given is of that kind")
    work = [(s, f) for s in shapes for f in formats if s.op == "linear" or f not in DENSE]
    if not work:
        raise MicroscaleError(f"--format {format}: experts are packed, and no shape given is a linear")
    rows = _numbers(m) if m is not None else QUICK_ROWS if quick else ROWS
    levels = _levels(level)
    if plot is not None:
        check_matplotlib()
    for path in (plot, save):
        check_writable(path)
    if (
        plot is not None
        and save is not None
        and plot.resolve() == save.resolve()
        and not plot.is_char_device()
    ):
        raise MicroscaleError(f"{plot}: --plot and --save are one file")

    repeat = repeat or (QUICK_REPEAT if quick else 15)
    with _threads(threads) as count:
        results, probes = _run(levels, work, rows, count, repeat, seed)
    document = _document(results, probes, count, repeat, seed)
    if save is not None:
        write_file(save, _json(document))
    if as_json:
        emit(document)
    else:
        _show(document)
    if plot is not None:  # last: nothing is lost with a picture
        write_file(plot, _plot(document))


Result = tuple[str, "Shape", str, int, "Times"]


def _run(
    levels: list[str],
    work: list[tuple[Shape, str]],
    rows: tuple[int, ...],
    threads: int,
    repeat: int,
    seed: int,
) -> tuple[list[Result], dict[str, Probe]]:
    import torch

    from microscale import env
    from microscale.bench.ceilings import Probe
    from microscale.bench.layers import DenseLayers, Layers
    from microscale.bench.timing import measure
    from microscale.canary import DTYPES
    from microscale.cli.output import progress
    from microscale.formats import FORMATS
    from microscale.machine import cache_bytes, detect

    cache, memory = cache_bytes() or 256 << 20, detect().memory
    generator = torch.Generator().manual_seed(seed)
    probes = {level: Probe(level, threads, cache, memory) for level in levels[:1]}
    for level in levels[1:]:
        probes[level] = probes[levels[0]].at(level)
    results: list[Result] = []
    room = memory // 2 if memory else 8 << 30
    for shape, fmt in progress(work, "kernels"):
        layers: DenseLayers | Layers
        if fmt in DENSE:
            layers = DenseLayers(shape, DTYPES[fmt], cache, room, generator)
        else:
            layers = Layers(shape, FORMATS[fmt], cache, room, generator)
        for m in rows:
            for level in levels:
                with env.using_cpu_level(level), torch.inference_mode():
                    (times,) = measure([partial(layers.call, m)], probes[level], repeat)
                results.append((level, shape, fmt, m, times))
        del layers  # before the next ones are made
    return results, probes


@contextmanager
def _threads(wanted: int | None) -> Iterator[int]:
    import torch

    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(word) if word.isdecimal() and len(word) < 10 else 0 for word in _words(text))
    if not numbers or min(numbers) < 1 or max(numbers) > 1 << 20:
        raise MicroscaleError(f"--m {brief(text)}: numbers from 1 to {1 << 20}, with commas between")
    return numbers


def _levels(text: str | None) -> list[str]:
    from microscale import env
    from microscale.backends import cpu_core
    from microscale.cli.output import known

    widest = cpu_core.level()
    if text is None:
        return [env.CPU_LEVELS[widest]]
    if text == "all":
        return list(env.CPU_LEVELS[: widest + 1])
    levels = [known(word, (*env.CPU_LEVELS, "all"), "level") for word in _words(text)]
    for word in levels:
        if word == "all" or env.CPU_LEVELS.index(word) > widest:
            raise MicroscaleError(f"--level {text}: the widest level here is {env.CPU_LEVELS[widest]}")
    if not levels:
        raise MicroscaleError("--level: no level is given")
    return levels


def _json(document: dict[str, Any]) -> bytes:
    import json

    return (json.dumps(document, indent=1) + "\n").encode()


def _document(
    results: list[Result], probes: dict[str, Probe], threads: int, repeat: int, seed: int
) -> dict[str, Any]:
    import torch

    from microscale import __version__
    from microscale.cli.explain import machine_document
    from microscale.machine import cache_bytes, detect

    return {
        "microscale": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "machine": machine_document(detect()) | {"cache_bytes": cache_bytes()},
        "threads": threads,
        "repeat": repeat,
        "seed": seed,
        "ceilings": {
            level: {
                "read_rate": ceilings.read,
                "read_rate_min": min(probe.reads),
                "read_rate_max": max(probe.reads),
                "flop_rate": ceilings.multiply,
                "flop_rate_min": min(probe.multiplies),
                "flop_rate_max": max(probe.multiplies),
                "probes": len(probe.multiplies),
            }
            for level, probe in probes.items()
            for ceilings in (probe.since(0),)
        },
        "cases": [
            {
                "level": level,
                "shape": shape.name,
                "op": shape.op,
                "format": fmt,
                "m": m,
                **times.document(),
            }
            for level, shape, fmt, m, times in results
        ],
    }


def _show(document: dict[str, Any]) -> None:
    from microscale.cli.output import grid, say, show

    machine = document["machine"]
    say(f"{machine['cpu']}, {document['threads']} threads; torch {document['torch']}", style="bold")
    for level, c in document["ceilings"].items():
        say(
            f"{level}: reads {c['read_rate'] / 1e9:.1f} GB/s "
            f"({c['read_rate_min'] / 1e9:.1f} to {c['read_rate_max'] / 1e9:.1f}), "
            f"multiplies {c['flop_rate'] / 1e12:.3g} TFLOP/s "
            f"({c['flop_rate_min'] / 1e12:.3g} to {c['flop_rate_max'] / 1e12:.3g}); median of {c['probes']} probes"
        )
    columns = ("level", "shape", "format", "M", "ms", "min", "max", "GB/s", "TFLOP/s", "of floor", "bound")
    table = grid(*columns, right=columns[3:10])
    for c in document["cases"]:
        table.add_row(
            c["level"],
            c["shape"],
            c["format"],
            str(c["m"]),
            *(f"{1e3 * c[f'seconds_{which}']:.3g}" for which in ("median", "min", "max")),
            f"{c['read_rate'] / 1e9:.1f}",
            f"{c['flop_rate'] / 1e12:.3g}",
            f"{c['of_floor']:.2f}",
            c["bound"],
        )
    show(table)
    say(
        "ms: median of a call; GB/s: codes and scales of the experts hit; of floor: the time that this machine needs "
        "at the least to read them, or to multiply, over the time taken"
    )


def _plot(document: dict[str, Any]) -> bytes:
    from microscale.bench.ceilings import Ceilings
    from microscale.bench.roofline import draw

    level, ceilings = max(document["ceilings"].items(), key=lambda item: item[1]["flop_rate"])
    series: dict[str, list[tuple[float, float, str]]] = {}
    for c in document["cases"]:
        words = [c["shape"], c["format"]] + ([c["level"]] if len(document["ceilings"]) > 1 else [])
        point = (c["flops"] / c["weight_bytes_median"], c["flop_rate"], f"M={c['m']}")
        series.setdefault(" ".join(words), []).append(point)
    title = f"{document['machine']['cpu']}, {document['threads']} threads, {level}"
    return draw(title, Ceilings(ceilings["read_rate"], ceilings["flop_rate"]), series)


@bench.command()
def tune(
    group: Annotated[
        str, typer.Option(help="Formats, with commas between: 4 bits, 6 or 8 bits, block; all.")
    ] = "all",
    op: Annotated[str, typer.Option(help="Only linear, or only moe; all.")] = "all",
    out: Annotated[Path | None, typer.Option(help="Write the tables here instead of to stdout.")] = None,
) -> None:
    """Measure again how Hopper's kernels are best cut, and write the tables that choose: minutes, and one for each cut
    that has not been compiled yet. Every cut's numbers are checked; src/microscale/backends/triton/cuts.json is where
    the tables belong.

    microscale bench tune --out cuts.json
    """
    from microscale.cli.files import check_writable, write_file
    from microscale.cli.output import known, say

    groups = ["4 bits", "6 or 8 bits", "block"]
    chosen = groups if group == "all" else [g.strip() for g in group.split(",")]
    for name in chosen:
        known(name, groups, "group of formats")
    known(op, ("all", "linear", "moe"), "kind of layer")
    check_writable(out)
    try:
        from microscale.bench.tune import tune as measure
    except ImportError as error:
        raise MicroscaleError(f"bench tune needs the package triton: {error}") from error
    document = measure(
        chosen, ["linear", "moe"] if op == "all" else [op], lambda line: say(line, style="dim", stderr=True)
    )
    if out is None:
        typer.echo(_json(document).decode(), nl=False)
    else:
        write_file(out, _json(document))
