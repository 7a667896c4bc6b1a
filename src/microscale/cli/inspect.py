"""`microscale inspect`: what a checkpoint holds, every byte of it, and whether it is quantised as it should be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microscale.errors import CheckpointError

if TYPE_CHECKING:
    from microscale.checkpoints import Checkpoint, Entry
    from microscale.quant import QuantTensor

_CHUNK = 1 << 20  # scales looked at at a time: masks are copies


@dataclass
class Group:
    """Tensors of one kind and format.

    Attributes:
        tensors: in the files: a packed weight is two or three.
        parameters: numbers that they stand for.
        nbytes: bytes in the files.
    """

    kind: str
    format: str
    quantised: bool
    leaves: dict[str, None] = field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0

    @property
    def name(self) -> str:
        """ "attention q/k/v/o"."""
        return " ".join(filter(None, (self.kind, "/".join(filter(None, self.leaves)))))


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Directory, hub id, or bundled name; the bundled model if left out.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="Fail unless quantised weights exist in this format and in no other; repeat to allow several."
        ),
    ] = None,
    scan: Annotated[bool, typer.Option("--scan", help="Read all scales and fail if one is NaN.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say what a checkpoint holds: formats, what is quantised and what is not, and where every byte goes.

    Exit code 0; 1 if --require is not met, experts are partly quantised, or --scan finds a NaN; 2 if it cannot be read.

    microscale inspect ./my-model --require mxfp4 --scan
    """
    from microscale.checkpoints import open_checkpoint
    from microscale.cli.output import emit, known
    from microscale.formats import FORMATS
    from microscale.models import BUNDLED, config_alone, resolve

    for word in require or ():
        known(word, FORMATS, "format")
    name = BUNDLED if model is None else model
    path = resolve(name)
    if config_alone(path):
        raise CheckpointError(path, f"a config alone has no bytes; `microscale explain {name}` plans it")
    checkpoint = open_checkpoint(path)
    found = groups(checkpoint)
    files = [_file(checkpoint, i) for i in range(len(checkpoint.source.files))]
    problems = missing(found, require or ()) + partly(checkpoint.groups)
    nans = _scan(checkpoint) if scan else None
    problems += [f"{name}: {count} of its scales are NaN" for name, count in (nans or {}).items()]
    document = {
        "path": str(path),
        "architecture": checkpoint.config.get("model_type"),
        "dialect": checkpoint.dialect,
        "formats": sorted({g.format for g in found if g.quantised}),
        "parameters": sum(g.parameters for g in found),
        "quantised_parameters": sum(g.parameters for g in found if g.quantised),
        "groups": [
            {
                "name": g.name,
                "format": g.format,
                "quantised": g.quantised,
                "tensors": g.tensors,
                "parameters": g.parameters,
                "bytes": g.nbytes,
            }
            for g in found
        ],
        "files": files,
        "bytes": sum(f["bytes"] for f in files),
        "nan_scales": nans,
        "problems": problems,
    }
    if as_json:
        emit(document)
    else:
        _show(document)
    if problems:
        raise typer.Exit(1)


def groups(checkpoint: Checkpoint) -> list[Group]:
    """Every tensor in exactly one group, experts first."""
    from microscale.canary import DTYPE_WORDS

    made: dict[tuple[str, str], Group] = {}
    for e in checkpoint.groups:
        kind, leaf = _kind(e)
        infos = [checkpoint.source.info(name) for name in e.tensors]
        dtype = infos[0].dtype
        fmt = e.format or DTYPE_WORDS.get(dtype, str(dtype).removeprefix("torch."))
        group = made.setdefault((kind, fmt), Group(kind, fmt, e.format is not None))
        group.leaves[leaf] = None
        group.tensors += len(infos)
        group.parameters += prod(e.shape)
        group.nbytes += sum(info.nbytes for info in infos)
    return sorted(made.values(), key=lambda g: (not g.kind.startswith("experts"), g.kind.startswith("norms")))


def missing(found: Iterable[Group], required: Sequence[str]) -> list[str]:
    """Sentences on what `--require` does not find, or finds too much."""
    if not required:
        return []
    held = {g.format for g in found if g.quantised}
    absent = [f"no weight is in {name}, which is required" for name in required if name not in held]
    return absent + [
        f"weights are in {name}, which is not required" for name in sorted(held.difference(required))
    ]


def partly(entries: Iterable[Entry]) -> list[str]:
    """A sentence if some experts are quantised and others are not: the commonest way in which quantisers fail."""
    packed: list[str] = []
    plain: list[str] = []
    for e in entries:
        kind, _ = _kind(e)
        if kind == "experts":
            (plain if e.format is None else packed).append(f"{e.module} {e.role}")
    if not packed or not plain:
        return []
    total = len(packed) + len(plain)
    return [f"{len(plain)} of {total} expert weights are not quantised, such as {plain[0]}"]


def nan_scales(weight: QuantTensor) -> int:
    """How many scales, and tensor scales, are NaN."""
    import torch

    scale, flat = weight.format.scale, weight.scales.reshape(-1)
    count = 0
    for part in flat.split(_CHUNK):
        if scale == "e8m0":
            bad = part == 0xFF
        elif scale == "e4m3":
            bad = (part & 0x7F) == 0x7F
        else:
            bad = torch.isnan(part)
        count += int(torch.count_nonzero(bad))
    if weight.tensor_scale is not None:
        count += int(torch.count_nonzero(torch.isnan(weight.tensor_scale)))
    return count


def _kind(e: Entry) -> tuple[str, str]:
    from microscale.layer_classes import kind_of

    last = e.module.rpartition(".")[2]
    vector = len(e.shape) < 2
    if "experts" in e.module.split("."):
        return ("expert biases", "") if e.role.endswith("bias") else ("experts", "")
    if not vector and (last.startswith("embed") or last == "wte"):
        return "embedding", ""
    if not vector and last == "lm_head":
        return "lm_head", ""
    kind, leaf = kind_of(e.module, not vector)
    return ("norms, biases, sinks", "") if vector else (kind, leaf)


def _file(checkpoint: Checkpoint, index: int) -> dict[str, Any]:
    """A file's length, told apart into header and tensors; the reader has checked that there is nothing else."""
    file = checkpoint.source.files[index]
    tensors = [info for info in checkpoint.source if info.file == file]
    header = min(info.offset for info in tensors)
    return {
        "name": file.name,
        "bytes": file.stat().st_size,
        "header_bytes": header,
        "tensor_bytes": sum(info.nbytes for info in tensors),
    }


def _scan(checkpoint: Checkpoint) -> dict[str, int]:
    """Weight -> number of NaN scales, for those that have any."""
    from microscale.cli.output import progress
    from microscale.quant import QuantTensor

    found = {}
    entries = [e for e in checkpoint.groups if e.format is not None]
    for e in progress(entries, "scales"):
        weight = checkpoint.load(e)
        if isinstance(weight, QuantTensor) and (count := nan_scales(weight)):
            found[f"{e.module} {e.role}"] = count
    return found


def _show(d: dict[str, Any]) -> None:
    from microscale.cli.output import clean, grid, human, say, show

    files, total, parameters = d["files"], d["bytes"], d["parameters"]
    say(
        f"{d['path']}: {d['architecture']}, {d['dialect']} dialect, {count(parameters)} parameters",
        style="bold",
    )
    columns = ("tensors", "format", "count", "parameters", "bytes", "bits each", "of file")
    rows = grid(*columns, right=columns[2:], wrap=("tensors",))

    def row(name: str, fmt: str, tensors: str, numbers: int, nbytes: int) -> None:
        bits = f"{8 * nbytes / numbers:.3g}" if numbers else ""
        share = f"{100 * nbytes / total:.1f} %"
        rows.add_row(clean(name), fmt, tensors, count(numbers) if numbers else "", human(nbytes), bits, share)

    for g in d["groups"]:
        row(g["name"], g["format"], str(g["tensors"]), g["parameters"], g["bytes"])
    row("file headers", "", "", 0, sum(f["header_bytes"] for f in files))
    row("total", "", str(sum(g["tensors"] for g in d["groups"])), parameters, total)
    show(rows)
    names = (
        files[0]["name"]
        if len(files) == 1
        else f"{len(files)} files, {files[0]['name']} to {files[-1]['name']}"
    )
    say(f"total is {total} bytes, the size of {names}")
    share = 100 * d["quantised_parameters"] / max(parameters, 1)
    kept = [g["name"] for g in d["groups"] if not g["quantised"]]
    if d["formats"]:
        whole = {g["format"] for g in d["groups"] if g["name"].startswith("experts")} & set(d["formats"])
        experts = (
            ", all experts among them" if whole and not any("expert" in p for p in d["problems"]) else ""
        )
        say(f"quantised: {share:.1f} % of the parameters, in {', '.join(d['formats'])}{experts}")
        say(f"not quantised: {', '.join(kept) or 'nothing'}")
    else:
        say("nothing is quantised")
    if d["nan_scales"] is not None and not d["nan_scales"]:
        say("no scale is NaN")
    for problem in d["problems"]:
        say(f"FAIL: {problem}", style="bold red")


def count(n: int) -> str:
    """20914757184 -> "20.9 G"."""
    value = float(n)
    for unit in ("", " k", " M", " G"):
        if value < 999.5:
            return f"{value:.0f}" if not unit else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"
