"""Which cut a linear of many tokens takes on Hopper, and how the tuner times steps; no GPU is needed."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest

from microscale.formats import FORMATS


def modules() -> tuple[Any, Any]:
    """`cuts` and `linear_rows`."""
    names = ("cuts", "linear_rows")
    return tuple(import_module(f"microscale.backends.triton.{name}") for name in names)  # type: ignore[return-value]


def test_of_many_tokens_the_sizes_decide_which_cut(layout: Any) -> None:
    cuts, rows = modules()
    fmt = FORMATS["mxfp4"]

    def taken(tokens: int, rows: int) -> str:
        cut = cuts.linear_cut(fmt, tokens, rows // 64, 1)
        return f"{cut.block_m}" + (f"+{cut.rest}" if cut.rest else "")

    # 80 and 128 tiles of rows, of which programs have one, two or four, and 132 multiprocessors.
    found = [taken(m, 5120) for m in (96, 128, 192, 256, 384, 512, 1024)]
    assert found == ["96", "112+16", "160+32", "192+64", "128", "176", "160+64"]
    found = [taken(m, 8192) for m in (96, 128, 192, 256, 384, 512)]
    assert found == ["96", "128", "192", "128", "192", "128"]
    # Few tiles of rows: more programs, each with fewer tokens.
    assert taken(256, 2048) == "64"
    for name in ("mxfp4", "mxfp8_e4m3", "fp8_block128"):
        row = cuts.table()[cuts.group(FORMATS[name])][0][-1]
        assert len(row.cuts) == len(row.steps) == len(set(row.cuts))
        plain = replace(row, rests=())
        for tokens in (65, 257, 1000, 5000, 100_000):
            for tiles in (1, 45, 80, 128, 1000):
                taken = {
                    c: step * rows.rounds(rows.programs(c, tokens, tiles).full)
                    for c, step in zip(row.cuts, row.steps, strict=True)
                }
                assert taken[plain.fit(tokens, tiles)] == min(taken.values())


def test_rounds_of_a_linear_are_programs_one_after_the_other(layout: Any) -> None:
    cuts, rows = modules()
    four, one = cuts.Cut.parse("m128t4c1w12s8x"), cuts.Cut.parse("m128t1c1w8s11x")
    # 120 programs of 132, 140, and of a tile each 131 to 133.
    assert [rows.rounds(rows.programs(four, m, 80).full) for m in (1, 768, 769)] == [1, 1, 2]
    found = [rows.rounds(rows.programs(one, 128, tiles).full) for tiles in (1, 131, 132, 133, 264, 265)]
    assert found == [1, 1, 1, 2, 2, 3]


def test_what_full_programs_leave_is_for_multiprocessors_that_have_one_less(layout: Any) -> None:
    cuts, rows = modules()
    four = cuts.Cut.parse("m160t4c1w12s7x64")
    assert (four.block_m, four.stages, four.wide, four.rest) == (160, 7, True, 64)
    # Six times 20 programs of four tiles, and ten of eight tiles; full ones alone; others alone, in two rows.
    assert rows.programs(four, 1024, 80) == (960, 120, 10)
    assert rows.programs(four, 960, 80) == (960, 120, 0)
    assert rows.programs(four, 100, 80) == (0, 0, 20)
    assert rows.programs(four, 161, 3) == (160, 1, 1)
    # Twelve multiprocessors have no full one: a program each, or two. All have one: the others come behind them.
    assert rows.busiest(rows.Programs(0, 120, 10), 800, 900) == 900
    assert rows.busiest(rows.Programs(0, 120, 13), 800, 500) == 1000
    assert rows.busiest(rows.Programs(0, 252, 10), 800, 500) == 1600
    assert rows.busiest(rows.Programs(0, 132, 10), 800, 500) == 1300
    row = rows.LinearRow(float("inf"), 0, (replace(four, rest=0),), (800.0,), rows.rests_of({"m64t8": 900}))
    assert [row.fit(m, 80).rest for m in (64, 160, 1000, 1024, 1025, 1120)] == [0, 0, 64, 64, 0, 0]
    with pytest.raises(ValueError, match="'t8' names no tokens and tiles"):
        rows.rests_of({"t8": 900})


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp6_e2m3", "fp8_block128"])
def test_both_kinds_of_programs_fit(layout: Any, name: str) -> None:
    cuts, _ = modules()
    fmt = FORMATS[name]
    row = cuts.table()[cuts.group(fmt)][0][-1]
    assert len(row.mixed()) == len(row.rests)
    mixed = {row.fit(m, tiles) for m in range(65, 2100, 33) for tiles in (32, 45, 80, 112, 172)}
    assert any(cut.rest for cut in mixed)
    for cut in {taken.fitted(fmt, 1) for taken in (*mixed, *row.mixed())}:
        assert cuts.Cut.parse(str(cut)) == cut
        assert cut.stages >= 3
        text = import_module("microscale.backends.triton.hopper_text")
        sizes = (cut.block_m, cut.stages, cut.users, cut.tiles // cut.users)
        spec = text.Spec(False, fmt.element.name, fmt.scale, *sizes, rest=cut.rest)
        assert spec.shared <= cut.shared(fmt, 1) <= cuts.HOPPER_SHARED


def test_steps_are_timed_where_a_cut_is_not_far_behind(layout: Any) -> None:
    cuts, rows = modules()
    linears = import_module("microscale.bench.tune_linears")
    one, two = cuts.Cut.parse("m64t1c1w8s14x"), cuts.Cut.parse("m128t2c1w12s10x")
    row = rows.LinearRow(float("inf"), 0, (one, two), (1.0, 1.0))
    times = {
        (64, 5120, 2560): {one: 8.0, two: 12.0},  # 40 steps: 200 ns; far behind
        (128, 8448, 2560): {one: 17.0, two: 14.0},  # twice 40: 212.5 ns, within 1.25; 350 ns
        (256, 8448, 2560): {one: 40.0, two: 13.0},  # far behind; 325 ns
        (256, 8448, 5120): {one: 80.0, two: 25.0},  # far behind; 80 steps: 312.5 ns
    }
    assert linears.steps_of(row, times) == (206.0, 325.0)
    behind = {(256, 8448, 2560): {one: 40.0, two: 13.0}}
    assert linears.steps_of(row, behind) == (250.0, 325.0)
