"""The tables of cuts for Hopper's kernels, and the tuner that makes them; no GPU is needed."""

from __future__ import annotations

import json
from importlib import import_module, resources
from typing import Any

import pytest
import torch

from microscale.formats import FORMATS


def test_every_number_of_tokens_has_a_cut_that_fits(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")

    def check(cut: Any, fmt: Any, parts: int) -> None:
        assert cuts.Cut.parse(str(cut)) == cut
        assert cut.shared(fmt, parts) <= cuts.HOPPER_SHARED
        assert cut.stages >= (2 if cut.rings else 3)
        assert cut.warps == 4 or cut.tiles >= 2 or cut.wide
        assert parts == 1 or cut.chunks == 1
        assert not cut.bulk or (parts == 1 and cut.overlap)
        assert cut.bulk or cut.wide or cut.rings or cuts.split(cut.block_m)[1] == 0

    for fmt in FORMATS.values():
        for tokens in (1, 2, 8, 9, 31, 64, 127, 300, 2048, 20000):
            for parts in (1, 2, 3):
                for tiles in (1, 80, 128):
                    check(cuts.linear_cut(fmt, tokens, tiles, parts), fmt, parts)
                for experts, top_k in ((8, 2), (32, 4), (128, 8)):
                    first, second = cuts.moe_cuts((fmt, fmt), tokens, top_k, experts, 768, parts)
                    assert (first.block_m, first.tail) == (second.block_m, second.tail)
                    # Gates and ups that lie apart: `Cut.of_experts` sees to it.
                    assert first.tiles >= 2 or first.few
                    assert not (first.few or second.few) or parts == 1
                    assert not first.tail or first.block_m >= 16
                    assert tokens > 1 or first.block_m == 8  # routes that are tiles of their own
                    assert tokens > 1 or not (first.bulk or second.bulk)
                    check(first, fmt, parts)
                    check(second, fmt, parts)


def test_experts_of_many_tokens_take_wide_cuts_in_every_format(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    for fmt in FORMATS.values():
        for tokens in (512, 1024, 2048):
            assert cuts.moe_cuts((fmt, fmt), tokens, 8, 128, 768, 1)[0].wide, fmt


def test_gates_and_ups_that_lie_apart_have_groups_with_a_tile_of_both(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    fragments = import_module("microscale.backends.triton.fragments")
    empty = torch.empty(0, dtype=torch.int32)
    for name in ("mxfp4", "nvfp4"):
        w = fragments.Fragments(FORMATS[name], (2, 128, 256), None, empty, empty, None, None)
        for word, other in {
            "m32t9c1w16s8x": "m32t8c1w20s8x",
            "m48t9c1w16s8x": "m48t6c1w16s8x",
            "m80t6c1w16s8x": "m80t6c1w16s8x",
            "m144t3c1w16s8x": "m144t4c1w12s8x",
            "m112t4c1w12s8x": "m112t4c1w12s8x",
        }.items():
            cut = cuts.Cut.parse(word)
            assert cut.of_experts(w) == cut
            assert str(cut.of_experts(w, apart=True)) == other
    # Where there is no compiler for CUDA C++.
    usual = [
        str(cuts.Cut.parse(f"{w}s8x").usual(tail=True)) for w in ("m24t9c1w16", "m40t9c1w16", "m80t6c1w16")
    ]
    assert usual == ["m32t2c2w4s3h", "m64t2c1w4s6oh", "m80t2c1w4s3ohb4"]


def test_what_wide_kernels_leave_to_the_usual_ones(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, fragments = (import_module(f"microscale.backends.triton.{m}") for m in ("hopper_wide", "fragments"))
    monkeypatch.setattr(wide.nvrtc, "refuse", lambda: None)
    empty, bias = torch.empty(0, dtype=torch.int32), torch.zeros(128)

    def refused(name: str, rows: int, *biases: Any) -> bool:
        ratios = empty if name == "fp8_block128" else None
        w = fragments.Fragments(FORMATS[name], (2, rows, 256), None, empty, empty, None, None, ratios)
        return bool(wide.refuse(w, None, biases))

    for name in ("mxfp4", "fp8_block128"):
        assert not refused(name, 128, None, bias)
        assert refused(name, 128, bias.half())
        assert refused(name, 124, None)


def test_experts_that_a_loop_for_few_tokens_cannot_take_have_another(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    fragments = import_module("microscale.backends.triton.fragments")
    cut = cuts.Cut.parse("m8t1c2w4s6fp3")

    def weights(name: str, k: int) -> Any:
        empty = torch.empty(0, dtype=torch.int32)
        return fragments.Fragments(FORMATS[name], (2, 128, k), None, empty, empty, None, None)

    assert cut.of_experts(weights("mxfp4", 2880)) == cut
    # Three programs find room, and no fourth one.
    assert 227 << 8 < cut.shared(FORMATS["mxfp4"], 1, 2880) <= (228 << 10) // 3 - 1024
    assert cut.spread(396, 132) == cut
    assert str(cut.spread(397, 132)) == "m8t1c2w4s6f"
    assert cuts.Cut.parse("m8t1c2w4s6f").room(2880) == 12
    assert cuts.Cut.parse("m128t2c1w8s3ohb1p2").spread(10000, 132).programs == 2
    assert str(cut.of_experts(weights("mxfp4", 2880), apart=True)) == "m8t2c2w8s6f"
    # Mixtral's w2: a token's 14336 numbers, of eight that there could be, leave 3 KiB.
    widest = cuts.Cut.parse("m8t1c2w4s8f")
    assert widest.of_experts(weights("mxfp4", 14336)) == widest
    assert widest.shared(FORMATS["mxfp4"], 1, 14336) == 224 << 10
    # All of K must find room, and block FP8's sums are rescaled between steps.
    for name, k in (("mxfp4", 16384), ("fp8_block128", 256)):
        other = cut.of_experts(weights(name, k))
        assert not other.few
        assert other.block_m == 8
        assert other.shared(FORMATS[name], 1) <= cuts.HOPPER_SHARED


def test_each_row_of_the_tables_says_what_it_took(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    text = (resources.files("microscale.backends.triton") / "cuts.json").read_text("utf-8")
    for name, rows in json.loads(text)["tables"]["sm_90"].items():
        assert name in {cuts.group(fmt) for fmt in FORMATS.values()}
        assert rows["linear"][-1]["tokens"] is None
        assert (rows["moe"][-1]["routes"], rows["moe"][-1]["each"]) == (None, None)
        for row in rows["linear"] + rows["moe"]:
            assert row["us"], row
            assert all(0 < us < 1e5 for us in row["us"].values())


def test_experts_of_many_tokens_take_what_multiplies_least(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    cut = cuts.Cut.parse("m112t4c1w12s9x")
    assert cuts.loops(144) == (144, 136, 128, 120, 112, 104, 96, 88, 80, 72)
    assert cuts.loops(48) == (48, 40, 32, 24)
    start = cuts.start(cut)
    assert start == 64
    taken = {1: 56, 56: 56, 57: 64, 112: 112, 113: 112 + start + 56, 176: 112 + start + 64, 224: 224 + start}
    assert {routes: cuts.padded(cut, routes) - start for routes in taken} == taken
    # Of about 170 routes all have two programs, of 220 some have three, and of 80 all but a few have one.
    assert 174 + 2 * start < cuts.mean_padded(cut, 170) < 182 + 2 * start
    assert 224 + 2 * start < cuts.mean_padded(cut, 220) < 280 + 3 * start
    assert 82 + start < cuts.mean_padded(cut, 80) < 88 + start
    row = cuts.table()["4 bits"][1][-1]
    found = [row.fit(each)[0].block_m for each in (16, 32, 40, 64, 72, 96, 128, 160, 192, 256)]
    assert found == [24, 48, 64, 80, 88, 144, 144, 88, 112, 144]
    assert [cuts.start(cuts.Cut.parse(f"m48{rest}")) for rest in ("t6c1w16s8x", "t8c1w20s8x")] == [56, 52]
    for each in (27.5, 61.0, 333.3, 5000.0):
        assert cuts.mean_padded(row.fit(each)[0], each) == min(
            cuts.mean_padded(a, each) for a, _ in row.pairs
        )


def test_columns_of_w2_choose_its_cut(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    pair = (FORMATS["mxfp4"],) * 2
    for rings, tiles in ((True, [4, 6, 3, 3]), (False, [4, 4, 2, 2])):
        found = [cuts.moe_cuts(pair, 16, 8, 128, k, 1, rings)[1] for k in (768, 2048, 2049, 14336)]
        assert [cut.tiles for cut in found] == tiles
        assert all(cut.rings == rings for cut in found)
    assert cuts.moe_cuts(pair, 4, 8, 128, 768, 1, rings=False)[1].tiles == 2  # too few programs


def test_experts_of_few_tokens_have_rings_and_those_of_one_do_not(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    for fmt in FORMATS.values():
        for top_k, experts, columns in ((4, 32, 2880), (8, 128, 768), (10, 512, 512), (2, 8, 14336)):
            for tokens in (1, 2, 8, 16):
                found = cuts.moe_cuts((fmt, fmt), tokens, top_k, experts, columns, 1)
                assert [cut.rings for cut in found] == [tokens > 1] * 2, (fmt, tokens)


def test_the_tuner_fits_wide_cuts_to_the_format(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts, tune = (
        import_module(f"microscale.{name}") for name in ("backends.triton.cuts", "bench.tune_candidates")
    )
    monkeypatch.setattr(tune.nvrtc, "refuse", lambda: None)
    for fmt in FORMATS.values():
        assert tune.wide_candidates(fmt, 27) == tune.wide_candidates(fmt, 10, experts=True) == []
        three = [cut.tiles == 9 for cut in tune.wide_candidates(fmt, 12, experts=True)]
        assert any(three) == (fmt.element.bits == 4)
        assert not all(three)
        for tokens in (28, 48, 128, 256, 2048):
            found = tune.wide_candidates(fmt, tokens)
            assert found
            for cut in found + tune.wide_candidates(fmt, tokens, experts=True):
                assert cut.wide
                assert cut.shared(fmt, 1) <= cuts.HOPPER_SHARED
    assert str(tune.wide_candidates(FORMATS["mxfp4"], 128)[2]) == "m128t4c1w12s8x"
    assert str(tune.wide_candidates(FORMATS["mxfp8_e4m3"], 128)[2]) == "m128t4c1w12s6x"


def test_a_cut_that_does_not_fit_is_refused_before_it_is_compiled(layout: Any) -> None:
    wide, text = (import_module(f"microscale.backends.triton.{m}") for m in ("hopper_wide", "hopper_text"))
    spec = text.Spec(False, "e4m3", "e8m0", most=128, stages=8, each=2, even=True, bias=(0,))
    with pytest.raises(wide.nvrtc.CompileError, match=r"8 stages of 128 tokens .* Cut\.fitted"):
        wide._kernel(spec, 0)


def test_the_tuner_tries_what_fits_and_keeps_the_fastest(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    tune, candidates, linears = (
        import_module(f"microscale.bench.{name}") for name in ("tune", "tune_candidates", "tune_linears")
    )
    assert set(tune.FORMAT_OF) == set(cuts.table())
    for name, word in tune.FORMAT_OF.items():
        fmt = FORMATS[word]
        assert cuts.group(fmt) == name
        for tokens in (1, 8, 16, 32, 64, 128, 256, 2048):
            found = candidates.candidates(fmt, tokens, tail=True)
            assert len(found) == len(set(found)) >= 2
            for cut in found:
                assert cut.shared(fmt, 1) <= cuts.HOPPER_SHARED
                assert cut.overlap or not cut.bulk
    for name, (linear, _) in cuts.table().items():
        for row in linear:
            fmt = linears.format_of(row, FORMATS[tune.FORMAT_OF[name]])
            assert cuts.group(fmt) == name
            assert row.bits in (0, fmt.element.bits)
            m, names = linears.timed_with(linear, row, fmt)
            assert names
            assert m <= row.tokens
    times = {"a": {"x": 1.0, "y": 4.0}, "b": {"x": 1.5, "y": 2.0}, "c": {"x": 3.0, "y": 2.0}}
    assert candidates.least_loss(times) == "b"


def test_the_tuner_writes_rows_as_they_are_read(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    linears, experts = (import_module(f"microscale.bench.tune_{name}") for name in ("linears", "experts"))
    text = (resources.files("microscale.backends.triton") / "cuts.json").read_text("utf-8")
    for name, written in json.loads(text)["tables"]["sm_90"].items():
        linear, moe = cuts.table()[name]
        for row, was in zip(linear, written["linear"], strict=True):
            assert linears.entry_of(row) | {"us": was["us"]} == was
        for row, was in zip(moe, written["moe"], strict=True):
            times = {pair: {} for pair in row.pairs}
            times[row.pairs[-1]] = was["us"]
            assert experts.moe_entry(row, times) == was


def test_of_several_pairs_each_is_timed_where_it_is_taken(layout: Any) -> None:
    cuts, experts, gpu = (
        import_module(f"microscale.{name}")
        for name in ("backends.triton.cuts", "bench.tune_experts", "bench.gpu")
    )
    row = cuts.table()["4 bits"][1][-1]
    model = gpu.MODELS["gpt-oss-20b"]
    for each in (40.0, 128.0):
        assert experts._pairs(row, FORMATS["mxfp4"], model, 999, each, None) == [row.fit(each)]
