"""The roofline: rates over FLOPs per byte, and the two ceilings over them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from io import BytesIO

from microscale.bench.ceilings import Ceilings
from microscale.errors import MicroscaleError


def check_matplotlib() -> None:
    """Before anything is measured that could then not be drawn.

    Raises:
        MicroscaleError: matplotlib is absent.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MicroscaleError(
            "a plot is drawn by matplotlib, which is not installed: pip install 'microscale[bench]'"
        )


def draw(title: str, ceilings: Ceilings, series: Mapping[str, Sequence[tuple[float, float, str]]]) -> bytes:
    """A PNG.

    Args:
        series: label -> (FLOPs per byte, FLOPs per second, word beside the point), in any order.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    xs = [x for points in series.values() for x, _, _ in points]
    ridge = ceilings.multiply / ceilings.read
    low, high = min([*xs, ridge]) / 2, max([*xs, ridge]) * 2
    roof = [(x, min(x * ceilings.read, ceilings.multiply) / 1e12) for x in (low, ridge, high)]
    axes.plot(*zip(*roof, strict=True), color="black")
    axes.annotate(
        f"read {ceilings.read / 1e9:.1f} GB/s, multiply {ceilings.multiply / 1e12:.3g} TFLOP/s",
        (ridge, ceilings.multiply / 1e12),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
    )
    for label, points in series.items():
        ordered = sorted(points)
        rates = [y / 1e12 for _, y, _ in ordered]
        axes.plot([x for x, _, _ in ordered], rates, marker="o", markersize=4, linewidth=1, label=label)
        if len(series) <= 4:
            for (x, _, word), y in zip(ordered, rates, strict=True):
                axes.annotate(word, (x, y), xytext=(3, -9), textcoords="offset points", fontsize=7)
    axes.set(title=title, xlabel="FLOPs per byte of weights", ylabel="TFLOP/s", xscale="log", yscale="log")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7, ncols=2 if len(series) > 8 else 1, loc="lower right")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()
