"""`microscale eval`: what each format costs a model in perplexity, as one table."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microscale.errors import CheckpointError, FormatError, MicroscaleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from microscale.integrations.hf.survey import Report
    from microscale.perplexity import Perplexity

SHIPPED = "as shipped"
_LONGEST = 1 << 28  # bytes of a text
_COLUMNS = ("weights", "quantised", "bits/weight", "perplexity", "bits/byte", "change", "SQNR")


@dataclass(frozen=True)
class Variant:
    """A line of the table.

    Attributes:
        bits: stored bits of one quantised number; of one number where nothing is quantised.
        report: what is quantised; without rows where nothing is.
        sqnr: dB, against the master's numbers (or the shipped ones, where they are what was quantised).
        seconds: loading, quantising and reading the text.
    """

    name: str
    bits: float
    report: Report
    sqnr: float | None
    result: Perplexity
    seconds: float


@dataclass(frozen=True)
class Setting:
    """What all variants have in common."""

    tokens: Tensor
    text_bytes: int
    window: int
    what: tuple[str, ...]
    options: dict[str, Any]


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Directory, hub id, or bundled name; the bundled model if left out.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file; the bundled held-out text if left out.")
    ] = None,
    formats: Annotated[
        str, typer.Option(help="Formats to try, with commas between; all; none: only the model as it is.")
    ] = "all",
    what: Annotated[
        str, typer.Option(help="What to quantise: experts, linear, patterns of module paths, with commas.")
    ] = "experts,linear",
    master: Annotated[
        str | None, typer.Option(help="The unquantised checkpoint: quantise from it, and compare with it.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens predicted in one go; default 1024, or the model's context."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Predict only so many tokens.")] = None,
    act: Annotated[
        str, typer.Option(help="How activations are stored: a16, a8, a6, a4, or a format.")
    ] = "a16",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of all that is not quantised: fp32 (shows the weights' error alone), bf16, fp16, auto."
        ),
    ] = "fp32",
    backend: Annotated[str | None, typer.Option(help="The only backend allowed.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the first GPU if left out.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure a model's perplexity as it is, and with its weights in other formats.

    microscale eval --formats all --markdown
    """
    from microscale.backends import table
    from microscale.canary import DTYPES
    from microscale.cli.explain import check_act
    from microscale.cli.output import emit, known, progress, quiet_libraries
    from microscale.formats import FORMATS
    from microscale.integrations.hf.loading import target_device
    from microscale.models import BUNDLED, resolve

    check_act(act)
    target_device(device)
    known(dtype, (*DTYPES, "auto"), "dtype")
    if backend is not None:
        known(backend, [b.name for b in table()], "backend")
    if markdown and as_json:
        raise MicroscaleError("--markdown or --json, not both")
    names = list(FORMATS) if formats == "all" else [] if formats == "none" else formats.split(",")
    for word in names:
        known(word, (*FORMATS, "all", "none"), "format")
    quiet_libraries()
    name = BUNDLED if model is None else model
    path, text_path = resolve(name), text or resolve(BUNDLED) / "heldout.txt"
    options = {"dtype": DTYPES.get(dtype, "auto"), "device": device, "backend": backend, "act": act}
    setting = _setting(path, text_path, window, max_tokens, tuple(what.split(",")), options)

    variants, refused = [], {}
    if master is not None:
        variants.append(_unquantised(resolve(master), setting))
    variants.append(_shipped(path, None if master is None else resolve(master), setting))
    if master is None and variants[0].report.rows:
        variants.append(_unpacked(path, setting))
    for word in progress(names, "formats"):
        try:
            variants.append(_requantised(resolve(master) if master else path, word, setting))
        except FormatError as error:
            if formats != "all":
                raise
            refused[word] = str(error)
    document = {
        "model": name,
        "master": master,
        "text": text_path.name,
        "tokens": len(setting.tokens) - 1,
        "text_bytes": setting.text_bytes,
        "window": setting.window,
        "what": list(setting.what),
        "act": act,
        "dtype": dtype,
        "variants": [_document(v, variants[0]) for v in variants],
        "refused": refused,
    }
    if as_json:
        emit(document)
    else:
        _show(document, variants, markdown)


def _setting(
    path: Path,
    text: Path,
    window: int | None,
    max_tokens: int | None,
    what: tuple[str, ...],
    options: dict[str, Any],
) -> Setting:
    import torch

    from microscale.checkpoints import read_config
    from microscale.cli.session import tokenizer_of

    tokenizer = tokenizer_of(str(path))
    if tokenizer is None:
        raise CheckpointError(path, "has no tokenizer, so its perplexity on a text cannot be measured")
    try:
        with text.open("rb") as file:  # of a device or a pipe, perhaps, that has no end
            raw = file.read(_LONGEST + 1)
        if len(raw) > _LONGEST:
            raise MicroscaleError(f"{text}: goes on behind {_LONGEST} bytes")
        ids = tokenizer(raw.decode(), verbose=False)["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise MicroscaleError(f"{text}: {getattr(error, 'strerror', None) or error}") from error
    if len(ids) < 2:
        raise MicroscaleError(f"{text}: {len(ids)} tokens, and none is predicted but from those before it")
    tokens = torch.tensor(ids)[: None if max_tokens is None else max_tokens + 1]
    # Marks between documents are predicted, but are no text. Nothing is tidied up, so that bytes stay what they were.
    seen = tokenizer.decode(tokens[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    context = read_config(path).get("max_position_embeddings", 1024)
    if window is not None and window > context:
        raise MicroscaleError(f"--window {window}: the model's context is {context}")
    return Setting(tokens, len(seen.encode()), window or min(1024, context), what, options)


def _load(path: Path, setting: Setting) -> Any:
    from microscale import load
    from microscale.cli.output import progress
    from microscale.integrations.hf.attention import fuse_sinks

    model = load(path, progress=lambda items: progress(items, "placing layers"), **setting.options)
    fuse_sinks(model)
    return model


def _measure(model: Any, setting: Setting) -> Perplexity:
    from microscale.cli.output import progress
    from microscale.perplexity import perplexity

    def bar(items: Any) -> Any:
        return progress(items, "reading")

    return perplexity(model, setting.tokens, setting.window, bar, text_bytes=setting.text_bytes)


def _unquantised(path: Path, setting: Setting) -> Variant:
    from microscale.integrations.hf.survey import Report

    started = time.perf_counter()
    result = _measure(_load(path, setting), setting)
    word, bits = _stored(path)
    return Variant(f"{word} master", bits, Report(()), None, result, time.perf_counter() - started)


def _shipped(path: Path, master: Path | None, setting: Setting) -> Variant:
    from microscale.integrations.hf.survey import survey

    started = time.perf_counter()
    model = _load(path, setting)
    result = _measure(model, setting)
    report = survey(model, None if master is None else _load(master, setting))
    bits = report.bits_per_weight if report.rows else _stored(path)[1]
    sqnr = report.sqnr if report.rows and master else None
    return Variant(SHIPPED, bits, report, sqnr, result, time.perf_counter() - started)


def _unpacked(path: Path, setting: Setting) -> Variant:
    """The shipped numbers as dense weights: another path through other code, so its perplexity is a check."""
    from microscale.integrations.hf.requantize import dequantize_model
    from microscale.integrations.hf.survey import Report

    started = time.perf_counter()
    model = dequantize_model(_load(path, setting))
    result = _measure(model, setting)
    return Variant("unpacked to bf16", 16, Report(()), None, result, time.perf_counter() - started)


def _requantised(path: Path, fmt: str, setting: Setting) -> Variant:
    from microscale import requantize

    started = time.perf_counter()
    model = _load(path, setting)
    options = {key: setting.options[key] for key in ("act", "backend")}
    report = requantize(model, fmt, what=setting.what, **options)
    result = _measure(model, setting)
    return Variant(fmt, report.bits_per_weight, report, report.sqnr, result, time.perf_counter() - started)


def _stored(path: Path) -> tuple[str, float]:
    """The word for the dtype of most of a checkpoint's numbers, and its bits."""
    from collections import Counter

    from microscale.canary import DTYPE_WORDS
    from microscale.checkpoints import open_checkpoint

    sizes: Counter[Any] = Counter()
    for info in open_checkpoint(path).source:
        sizes[info.dtype] += info.nbytes
    dtype = sizes.most_common(1)[0][0]
    return DTYPE_WORDS.get(dtype, str(dtype)), 8 * dtype.itemsize


def _document(v: Variant, first: Variant) -> dict[str, Any]:
    change, stderr = v.result.change(first.result)
    return {
        "name": v.name,
        "quantised": _quantised(v),
        "weights": v.report.weights,
        "bytes": v.report.bytes_after,
        "bits_per_weight": v.bits,
        "perplexity": v.result.perplexity,
        "perplexity_stderr": v.result.stderr,
        "nll": v.result.nll,
        "bits_per_byte": v.result.bits_per_byte,
        "change": change,
        "change_stderr": stderr,
        "sqnr_db": v.sqnr,
        "sqnr_db_by_group": None if v.sqnr is None else {g: v.report.of(g).sqnr for g in v.report.groups},
        "seconds": v.seconds,
    }


def _quantised(v: Variant) -> str:
    """ "experts mxfp4", "experts, linear"."""
    parts = []
    for group in v.report.groups:
        formats = sorted({row.format for row in v.report.of(group).rows})
        parts.append(group if formats == [v.name] else f"{group} {' '.join(formats)}")
    return ", ".join(parts) or "nothing"


def _cells(v: Variant, first: Variant) -> tuple[str, ...]:
    result = v.result
    change, stderr = result.change(first.result)
    moved = "" if v is first else f"{'+' * (change >= 0)}{plus_minus(100 * change, 100 * stderr)} %"
    return (
        v.name,
        _quantised(v),
        f"{v.bits:.4g}",
        plus_minus(result.perplexity, result.stderr, digits=4),  # formats differ by less than the text does
        "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}",
        moved,
        "" if v.sqnr is None else "exact" if v.sqnr == float("inf") else f"{v.sqnr:.1f} dB",
    )


def plus_minus(value: float, error: float, digits: int = 2) -> str:
    """ "12.345 ± 0.067", "5.5823 ± 0.32": the error to two digits, the value to `digits` past the error's first."""
    if not math.isfinite(error) or error <= 0:
        return f"{value:.5g}"
    first = -math.floor(math.log10(error))
    shown = f"{error:.{max(first + 1, 0)}f}"
    return f"{value:.{max(first + digits - 1, 0)}f} ± {shown}"


def _show(document: dict[str, Any], variants: Sequence[Variant], markdown: bool) -> None:
    from microscale.cli.output import clean, grid, say, show

    lines = [_cells(v, variants[0]) for v in variants]
    if markdown:
        _show_markdown(lines)
    else:
        rows = grid(*_COLUMNS, right=_COLUMNS[2:], wrap=("quantised",))
        for line in lines:
            rows.add_row(*map(clean, line))
        show(rows)
    source = "the master" if document["master"] else "the shipped weights"
    say()
    say(
        f"{document['model']} on {document['tokens']} tokens ({document['text_bytes']} bytes) of {document['text']}, "
        f"in windows of {document['window']}; computed in {document['dtype']}, activations {document['act']}. "
        f"Formats are made from {source}, and SQNR is against these. ± is one standard error over windows; "
        f"that of a change is of paired differences to the first row.",
        hang=0,
    )
    for name, why in document["refused"].items():
        say(f"- {name}: {why}")


def _show_markdown(lines: list[tuple[str, ...]]) -> None:
    print(f"| {' | '.join(_COLUMNS)} |")
    print(f"| {' | '.join('---' if i < 2 else '---:' for i in range(len(_COLUMNS)))} |")
    for line in lines:
        print(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |")
