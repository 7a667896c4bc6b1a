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
        assert cut.stages >= 3
        assert cut.warps == 4 or cut.tiles >= 2
        assert parts == 1 or cut.chunks == 1
        assert not cut.bulk or (parts == 1 and cut.overlap)
        assert cut.bulk or cut.wide or cuts.split(cut.block_m)[1] == 0

    for fmt in FORMATS.values():
        for tokens in (1, 2, 8, 9, 31, 64, 127, 300, 2048, 20000):
            for parts in (1, 2, 3):
                for tiles in (1, 80, 128):
                    check(cuts.linear_cut(fmt, tokens, tiles, parts), fmt, parts)
                for experts, top_k in ((8, 2), (32, 4), (128, 8)):
                    first, second = cuts.moe_cuts((fmt, fmt), tokens, top_k, experts, parts)
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
        assert all(cuts.moe_cuts((fmt, fmt), tokens, 8, 128, 1)[0].wide for tokens in (512, 1024, 2048)), fmt


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


def test_of_many_tokens_the_sizes_decide_which_cut(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    fmt = FORMATS["mxfp4"]

    def block(tokens: int, rows: int) -> int:
        return int(cuts.linear_cut(fmt, tokens, rows // 64, 1).block_m)

    # 80 and 128 tiles of rows, of which programs have two or four, and 132 multiprocessors.
    assert [block(m, 5120) for m in (200, 256, 384, 512, 640, 768)] == [88, 88, 128, 176, 216, 128]
    assert [block(m, 5120) for m in (1024, 1152, 1280, 2048, 3072, 8192)] == [176, 384, 104, 160, 120, 128]
    assert [block(m, 8192) for m in (256, 512, 768, 1024, 2048, 8192)] == [128, 128, 384, 128, 128, 128]
    # Few tiles of rows: more programs, each with one.
    assert str(cuts.linear_cut(fmt, 256, 16, 1)) == "m128t1c2w4s3ob4"
    row = cuts.table()["4 bits"][0][-1]
    assert str(row.cut) == "m128t4c1w12s8x"
    assert cuts.rounds(row.cut, 768, 80) == 4 * (128 + cuts.START[2])  # 120 programs
    assert cuts.rounds(row.cut, 769, 80) == 2 * 4 * (128 + cuts.START[2])  # 140
    # Fewer tokens than what is decoded in their time.
    narrow = cuts.Cut.parse("m88t2c1w12s13x")
    assert cuts.rounds(narrow, 88, 80) == 2 * (cuts.DECODING[1] + cuts.START[1])
    for tokens in (257, 1000, 5000, 100_000):
        for tiles in (1, 45, 80, 128, 1000):
            taken = cuts.rounds(row.fit(tokens, tiles), tokens, tiles)
            least = min(cuts.rounds(cut, tokens, tiles) for cut in (row.cut, *row.others))
            assert least <= taken <= least / 0.97
            assert taken >= tiles * tokens / cuts.MULTIPROCESSORS


def test_the_tuner_fits_wide_cuts_to_the_format(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts, tune = import_module("microscale.backends.triton.cuts"), import_module("microscale.bench.tune")
    monkeypatch.setattr(tune.nvrtc, "refuse", lambda: None)
    for fmt in FORMATS.values():
        assert tune.wide_candidates(fmt, 27) == []
        for tokens in (28, 48, 128, 256, 2048):
            found = tune.wide_candidates(fmt, tokens)
            assert found
            for cut in found:
                assert cut.wide
                assert cut.shared(fmt, 1) <= cuts.HOPPER_SHARED
    assert str(tune.wide_candidates(FORMATS["mxfp4"], 128)[2]) == "m128t4c1w12s8x"
    assert str(tune.wide_candidates(FORMATS["mxfp8_e4m3"], 128)[2]) == "m128t4c1w12s6x"


def test_a_cut_that_does_not_fit_is_refused_before_it_is_compiled(layout: Any) -> None:
    wide, text = (import_module(f"microscale.backends.triton.{m}") for m in ("hopper_wide", "hopper_text"))
    spec = text.Spec(False, "e4m3", "e8m0", most=128, stages=8, each=2, even=True, bias=(0,))
    with pytest.raises(wide.nvrtc.CompileError, match=r"8 stages of 128 tokens .* Cut\.fitted"):
        wide._kernel(spec, 0)


def test_turns_of_two_steps_are_for_what_was_timed() -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    cuts, text = (import_module(f"microscale.backends.triton.{m}") for m in ("cuts", "hopper_text"))
    paired = set()
    for name in ("mxfp4", "nvfp4", "mxfp8_e4m3"):
        fmt = FORMATS[name]
        wide = {r.first.fitted(fmt, 1) for r in cuts.table()[cuts.group(fmt)][1] if r.first.wide}
        for most, stages, users, tiles in {(c.block_m, c.stages, c.users, c.tiles) for c in wide}:
            assert stages >= 4
            spec = text.Spec(True, fmt.element.name, fmt.scale, most, stages, users, tiles // users)
            assert ("one_step" in text.kernel(spec)) == spec.paired
            if spec.paired:
                paired.add((name, most))
    assert paired == {("mxfp4", 48), ("mxfp4", 64), ("mxfp4", 80)}
    assert not text.Spec(True, "e2m1", "e8m0", 48, 3, 2, 2).paired


def test_the_tuner_tries_what_fits_and_keeps_the_fastest(layout: Any) -> None:
    cuts = import_module("microscale.backends.triton.cuts")
    tune = import_module("microscale.bench.tune")
    assert set(tune.FORMAT_OF) == set(cuts.table())
    for name, word in tune.FORMAT_OF.items():
        fmt = FORMATS[word]
        assert cuts.group(fmt) == name
        for tokens in (1, 8, 16, 32, 64, 128, 256, 2048):
            found = tune.candidates(fmt, tokens, tail=True)
            assert len(found) == len(set(found)) >= 2
            for cut in found:
                assert cut.shared(fmt, 1) <= cuts.HOPPER_SHARED
                assert cut.overlap or not cut.bulk
    for linear, _ in cuts.table().values():
        for row in linear:
            entry = tune._entry(row)
            assert cuts.LinearRow(
                entry["tokens"] or float("inf"), entry.get("tiles", 0), cuts.Cut.parse(entry["cut"]),
                tuple(map(cuts.Cut.parse, entry.get("or", ()))),
            ) == row  # fmt: skip
            m, names = tune.timed_with(linear, row)
            assert names
            assert m <= row.tokens
    times = {"a": {"x": 1.0, "y": 4.0}, "b": {"x": 1.5, "y": 2.0}, "c": {"x": 3.0, "y": 2.0}}
    assert tune._best(times) == "b"
