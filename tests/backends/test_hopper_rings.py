"""`hopper_rings.cu` with no GPU: compiled for one, and run on the CPU by `hopper_emulated.h`."""

from __future__ import annotations

import re
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from test_hopper_wide import cut, packed, portable, random, touches_nothing
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.formats import FORMATS
from microscale.quant import quantize
from microscale.tolerance import moe_budget

SILU, STEP, PLAIN = Activation("silu"), Activation("swiglu_step", limit=1.0), Activation("silu", gated=False)
NAMES = ("mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp6_e2m3", "mxint8", "fp8_block128")
WORDS = ("m8t2c8w8s3r", "m8t4c4w8s3r", "m8t3c9w12s2r")
MANY = ("m16t2c4w8s2r", "m24t4c5w8s2r", "m32t3c4w12s2r")  # more than 8 tokens a tile


@pytest.fixture
def rings(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose kernels run on the CPU."""
    module = import_module("microscale.backends.triton.hopper_rings")
    monkeypatch.setattr(emulated.nvrtc, "refuse", lambda: None)
    for kind in (module, emulated):
        monkeypatch.setattr(kind, "zeros", lambda count, _: torch.zeros(count, dtype=torch.int32))
    return module


class Problem:
    """Experts, w13 with `columns[0]` columns, w2 with `columns[1]` and `rows` rows."""

    def __init__(
        self, seed: int, columns: tuple[int, int], rows: int, name: str = "mxfp4", activation: Activation = GPT_OSS,
        experts: int = 4,
    ) -> None:  # fmt: skip
        self.generator, self.activation = torch.Generator().manual_seed(seed), activation
        (hidden, inner), self.experts = columns, experts
        self.w13 = quantize(self.random(experts, activation.rows(inner), hidden) / 8, name)
        self.w2 = quantize(self.random(experts, rows, inner) / 8, name)
        self.packed = packed(self.w13), packed(self.w2)
        self.biases: Any = (self.random(*self.w13.shape[:2]).bfloat16(), self.random(experts, rows))

    def random(self, *shape: int) -> Tensor:
        return random(self.generator, *shape)

    def spec(
        self, rings: Any, words: str, ids: Tensor, share: Tensor, expert_map: Tensor | None = None,
        weight_on_input: bool = False,
    ) -> Any:  # fmt: skip
        """`words`: cuts of w13 and w2, or of both."""
        pair = (cut(words.split()[0]), cut(words.split()[-1]))
        rest = self.biases, ids, share, expert_map, weight_on_input
        return rings.spec_of(pair, self.packed, self.activation, *rest)

    def check(
        self, rings: Any, words: str, ids: Tensor, expert_map: Tensor | None = None,
        kind: torch.dtype = torch.float32, alike: bool = False,
    ) -> Any:  # fmt: skip
        """Results are within what is permitted, and routes without an expert here have none. Returns the spec.

        Args:
            kind: of routing weights.
            alike: `hopper_wide` finds the same bits, which takes longer.
        """
        x = self.random(len(ids), self.w13.shape[-1]).bfloat16()
        share = self.random(*ids.shape).softmax(-1).to(kind)
        spec = self.spec(rings, words, ids, share, expert_map)
        y = rings.experts(x, ids, share, *self.packed, self.biases, self.activation, expert_map, spec)
        here = local(ids, self.experts, expert_map)
        there = (here >= 0).flatten()
        assert y[there].isfinite().all()
        assert y[~there].isnan().all()  # as `torch.empty` is in tests: nobody has written there
        biases = {"b13": self.biases[0], "b2": self.biases[1]}
        total = torch.where(there[:, None], y, 0).float().view(*ids.shape, -1).sum(1).bfloat16()
        worst = moe_budget(x, here, share, self.w13, self.w2, self.activation, **biases).worst(total)
        assert worst <= 1, f"error is {worst:.3g} times the permitted one"
        if alike:
            given = (
                x,
                ids,
                share,
                *self.packed,
                self.biases,
                self.activation,
                cut("m48t4c1w12s3x"),
                expert_map,
            )
            assert torch.equal(y[there], rings.hopper_wide.experts(*given)[there])
        return spec


def local(ids: Tensor, experts: int, expert_map: Tensor | None) -> Tensor:
    """Experts here, or -1."""
    numbers = torch.arange(experts) if expert_map is None else expert_map.long()
    known = (ids >= 0) & (ids < len(numbers))
    return torch.where(known, numbers[torch.where(known, ids, 0).long()], -1)


@pytest.mark.parametrize("name", NAMES)
def test_experts_of_each_format(rings: Any, name: str, seed: int) -> None:
    # Rows that do not fill a tile, tiles that do not fill a unit, and an odd number of steps.
    problem = Problem(seed, (256, 320), 136, name)
    ids = torch.randint(-1, 4, (9, 2))
    spec = problem.check(rings, WORDS[2], ids, alike=True)
    assert (spec.users, spec.each, spec.steps) == (3, 1, (4, 5))
    spec = problem.check(rings, MANY[1], ids, alike=True)
    assert (spec.most, spec.users, spec.each, spec.steps) == (24, 2, 2, (4, 5))


CUTS = (
    (WORDS[0], SILU, (640, 256), (2, 1, (5, 4))),  # gates and ups by two groups
    (WORDS[0], STEP, (256, 320), (2, 1, (4, 5))),
    (WORDS[0], GPT_OSS, (512, 448), (2, 1, (8, 7))),
    (WORDS[0], PLAIN, (256, 256), (2, 1, (4, 4))),
    (WORDS[1], SILU, (512, 192), (2, 2, (4, 3))),  # gates and ups by one
    (WORDS[1], GPT_OSS, (256, 256), (2, 2, (4, 4))),
    (WORDS[2], GPT_OSS, (576, 256), (3, 1, (9, 4))),
    (WORDS[2], SILU, (384, 320), (2, 1, (6, 5))),  # the third group has none to take turns with
    ("m8t6c4w12s2r", GPT_OSS, (256, 256), (3, 2, (4, 4))),
    ("m8t2c5w8s3r m8t2c4w8s3r", GPT_OSS, (640, 512), (2, 1, (5, 4))),
    (MANY[0], SILU, (256, 256), (2, 1, (4, 4))),
    (MANY[1], SILU, (320, 192), (2, 2, (5, 3))),
    (MANY[2], PLAIN, (192, 256), (3, 1, (3, 4))),
    ("m24t6c4w8s2r", GPT_OSS, (256, 192), (2, 3, (4, 3))),
)


@pytest.mark.parametrize(("words", "activation", "columns", "found"), CUTS)
def test_every_cut(
    rings: Any, words: str, activation: Activation, columns: tuple[int, int], found: Any, seed: int
) -> None:
    problem = Problem(seed, columns, 328, activation=activation)
    if activation is SILU:
        problem.biases = (None, None)
    kind = torch.bfloat16 if activation is STEP else torch.float32
    tokens = 7 if words.startswith("m8") else 40
    spec = problem.check(rings, words, torch.randint(0, 4, (tokens, 2)), kind=kind, alike=True)
    assert (spec.users, spec.each, spec.steps) == found


@pytest.mark.parametrize(
    ("tokens", "word"),
    [(1, WORDS[2]), (2, WORDS[2]), (8, WORDS[2]), (16, WORDS[2]), (32, WORDS[2]), (40, WORDS[2]), (40, WORDS[1]),
     (64, WORDS[1]), (97, WORDS[2]), (128, WORDS[0]),
     (40, MANY[0]), (160, MANY[1]), (250, MANY[2])],
)  # fmt: skip
def test_routes_are_found_wherever_they_are(rings: Any, tokens: int, word: str, seed: int) -> None:
    """By threads that have one each, or two or three."""
    problem = Problem(seed, (256, 256), 192)
    # Those that do not exist, and several of a token to one expert.
    ids = torch.randint(-2, 6, (tokens, 8))
    kind = torch.int32 if tokens % 16 else torch.int64
    spec = problem.check(rings, word, ids.to(kind))
    assert (spec.routes, spec.id_bytes) == (
        next(n for n in (64, 256, 512, 1024, 2048) if n >= 8 * tokens),
        kind.itemsize,
    )


@pytest.mark.parametrize("word", [WORDS[1], *MANY])
@pytest.mark.parametrize("map_kind", [None, torch.int32, torch.int64])
def test_experts_have_no_tile_or_many(rings: Any, map_kind: Any, word: str, seed: int) -> None:
    """Experts with none, one, a tile and more."""
    expert_map = None
    if map_kind is not None:
        expert_map = torch.tensor([-1, 6, 2, 5, 3, -1, 0])[torch.randperm(7)].to(map_kind)
    counts = torch.tensor([0, 1, 8, 9, 17, 8, 5])[torch.randperm(7)] * (1 if word[:2] == "m8" else 3)
    routes = torch.cat((torch.arange(7).repeat_interleave(counts), torch.tensor([-1, 1 << 30])))
    ids = routes[torch.randperm(len(routes))].view(-1, 2)
    Problem(seed, (256, 256), 136, experts=7).check(rings, word, ids.int(), expert_map)


@pytest.mark.parametrize(
    ("word", "activation"),
    [(WORDS[0], SILU), (WORDS[1], GPT_OSS), (WORDS[2], PLAIN), (MANY[0], SILU), (MANY[1], GPT_OSS)],
)
def test_whoever_is_late(rings: Any, word: str, activation: Activation, seed: int, monkeypatch: Any) -> None:
    """One program has the only tile, whose units of w2 wait for those of w13, or many, in each of which there are
    groups without rows."""
    problem = Problem(seed, (256, 256), 64, activation=activation, experts=13)
    launch, one = rings.hopper_wide.launch, torch.full((8, 1), 5)
    for late in range(8):
        monkeypatch.setattr(rings.hopper_wide, "launch", partial(launch, programs=1, seed=late))
        for ids in (one, torch.randperm(13).view(13, 1)):
            problem.check(rings, word, ids)
    monkeypatch.setattr(rings.hopper_wide, "launch", launch)
    for _ in range(8):
        problem.check(rings, word, one)


def test_what_is_for_other_kernels(rings: Any, seed: int) -> None:
    problem, other = Problem(seed, (256, 256), 64), Problem(seed, (256, 256), 64, "mxfp8_e4m3")
    ids, share = torch.zeros(128, 2, dtype=torch.int32), torch.ones(128, 2)

    def taken(words: str = WORDS[0], ids: Tensor = ids, share: Tensor = share, **rest: Any) -> bool:
        return problem.spec(rings, words, ids, share, **rest) is not None

    assert taken()
    assert not taken(weight_on_input=True)
    assert not taken("m8t1c8w4s3r")  # one group of warps
    assert not taken(ids=ids.short())
    assert not taken(share=share.half())
    assert not taken(expert_map=torch.zeros(4, dtype=torch.int16))
    assert not taken("m40t2c4w8s3r")  # tokens of a tile
    for routes in (2048, 2049):
        assert taken(ids=ids[:1, :1].expand(routes, 1)) == (routes == 2048)
    bias = torch.zeros(4 * 512 + 1).bfloat16()[1:].view(4, 512)
    for biases, good in (((None, None), True), ((bias, None), False), ((bias.clone(), None), True)):
        problem.biases = biases
        assert taken() == good
    problem.packed = problem.packed[0], other.packed[1]
    assert not taken()
    for columns in ((448, 256), (256, 448), (352, 256), (256, 288)):  # 7 steps, and halves of one
        problem = Problem(seed, columns, 64)
        assert not taken(WORDS[1])
        assert taken(WORDS[0]) == (448 in columns)


def spec_for(
    rings: Any,
    word: str,
    name: str,
    sizes: tuple[int, int, int],
    activation: Activation,
    ids: tuple[int, int],
) -> Any:
    """Of a call with so many tokens and routes of each, and experts, columns of w13 and of w2; there are no weights."""
    fragments = import_module("microscale.backends.triton.fragments")
    (experts, hidden, inner), meta, fmt = sizes, torch.device("meta"), FORMATS[name]

    def matrix(rows: int, columns: int) -> Any:
        codes = torch.empty(experts, -(-rows // 64), columns // 64, 1, device=meta)
        factor = torch.empty(experts, rows, device=meta) if fmt.tensor_scale else None
        return fragments.Fragments(fmt, (experts, rows, columns), None, codes, codes, factor, None)

    w13, w2 = matrix(2 * inner, hidden), matrix(hidden, inner)
    biases = [
        torch.empty(w.shape[:2], device=meta).bfloat16() if activation is GPT_OSS else None for w in (w13, w2)
    ]
    topk = torch.empty(ids, dtype=torch.int32, device=meta), torch.empty(ids, device=meta)
    return rings.spec_of((cut(word),) * 2, (w13, w2), activation, biases, *topk, None, False)


FOUR_BITS = ("m16t4c4w8s3r", "m16t6c5w12s2r", "m24t6c4w12s3r", "m24t6c5w12s2r")
MORE_BITS = ("m8t2c9w8s2r", "m16t4c4w8s2r", "m16t4c5w8s2r", "m24t4c3w8s3r", "m24t4c4w8s2r", "m24t4c5w8s2r")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        *product((*WORDS, "m8t6c4w12s2r", *FOUR_BITS), ["mxfp4"]),
        *product((WORDS[0], *FOUR_BITS), ["nvfp4"]),
        *product(MORE_BITS, ["mxint8", "fp8_block128"]),
    ],
)
def test_it_compiles_for_a_gpu(wide: Any, source: Any, word: str, name: str) -> None:
    """Of the sizes of Qwen3-30B-A3B and gpt-oss-20b."""
    if wide.nvrtc.refuse() is not None:
        pytest.skip(wide.nvrtc.refuse())
    rings = import_module("microscale.backends.triton.hopper_rings")
    of_gpt_oss = re.search("c[359]", word)
    sizes, activation = ((32, 2880, 2880), GPT_OSS) if of_gpt_oss else ((128, 2048, 768), SILU)
    spec = spec_for(rings, word, name, sizes, activation, (32, 8))
    assert spec.stages == cut(word).stages
    assert spec.shared + spec.fixed <= 227 << 10
    text = source.text(spec)
    compiles(wide, text, spec.fixed)
    before, _ = portable(text).split("griddepcontrol.wait")
    touches_nothing(before)


def compiles(wide: Any, text: str, most: int) -> None:
    """Without a stack, and with so much shared memory of its own at most."""
    log = wide.nvrtc.compiled("x.cu", text, ["--ptxas-options=-v"])[1]
    assert " 0 bytes stack frame, 0 bytes spill stores" in log, log
    assert int(log.rpartition(" bytes smem")[0].rpartition(" ")[2]) <= most


def test_lists_of_many_experts_fit_a_text_or_are_for_other_kernels(wide: Any, source: Any) -> None:
    """Of the size of Qwen3-Next-80B-A3B."""
    if wide.nvrtc.refuse() is not None:
        pytest.skip(wide.nvrtc.refuse())
    rings = import_module("microscale.backends.triton.hopper_rings")
    fits, other = (
        spec_for(rings, "m16t4c4w8s3r", "mxfp4", (512, 2048, 512), SILU, (tokens, 10))
        for tokens in (102, 103)
    )
    assert other is None
    compiles(wide, source.text(fits), 48 << 10)
