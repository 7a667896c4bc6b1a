"""The layout of Hopper's own kernels of the triton backend, and what their instructions make of it, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from triton_ahead import random_bytes, suitable_bytes

from microscale.formats import FORMATS
from microscale.quant import dequantize
from placed_layers import assert_same


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (65, 96), (130, 160), (2, 64, 64), (3, 200, 352)])
def test_unpack_is_the_exact_inverse_of_fragments(layout: Any, name: str, shape: tuple[int, ...]) -> None:
    fragments = import_module("microscale.backends.triton.fragments")
    w = suitable_bytes(name, shape)
    assert fragments.suits(w)
    packed = fragments.pack(w)
    with pytest.warns(UserWarning, match="kept a second time"):
        plain = packed.plain
    for back in (fragments.unpack(packed), layout.unpack(plain)):
        assert_same(back, w)


@pytest.mark.parametrize("name", FORMATS)
def test_fragments_are_for_bytes_that_the_layout_can_hold(layout: Any, name: str) -> None:
    fragments = import_module("microscale.backends.triton.fragments")
    w = suitable_bytes(name, (64, 64))
    element = w.format.element
    assert fragments.suits(w)
    for code, value in enumerate(element.values):
        if abs(value) == float("inf") or value != value:
            codes = w.codes.clone()
            codes[-1, -1] = code
            assert not fragments.suits(replace(w, codes=codes)), code
    if w.format.scale == "f32":
        return
    codes = torch.full_like(w.codes, 0x55)  # no zero among them
    least, greatest = fragments.scale_bytes(element) if w.format.scale == "e8m0" else (0, 126)
    for scale, good in (
        (least, True),
        (greatest, True),
        (greatest + 1, False),
        (255, False),
        (least - 1, False),
    ):
        if scale >= 0:
            scales = torch.full_like(w.scales, least)
            scales[-1, -1] = scale
            assert fragments.suits(replace(w, codes=codes, scales=scales)) == good, scale
    # Where there are only zeros a scale of 0 does no harm.
    assert fragments.suits(replace(w, codes=torch.zeros_like(codes), scales=torch.zeros_like(w.scales)))
    short = random_bytes(name, (64, 48))
    short.codes.zero_()
    assert not fragments.suits(short)


def test_block_scales_are_powers_of_two_and_ratios(layout: Any) -> None:
    """What a block's products are multiplied by on the way through a row's ratios is its scale; 0 and NaN, too."""
    fragments = import_module("microscale.backends.triton.fragments")
    w = suitable_bytes("fp8_block128", (300, 480))
    w.scales.copy_(torch.randn_like(w.scales) * 2.0 ** torch.randint(-90, 6, w.scales.shape))
    w.scales[0, 1], w.scales[1, 2] = 0.0, float("nan")
    assert fragments.suits(w)
    packed = fragments.pack(w)
    fields = packed.scales[0] >> 7 & 255
    assert torch.equal(
        packed.scales[0], fields << 7 | fields << 23 | (fields >> 1) | (fields & 1) << 31 | fields << 15
    )
    powers = torch.where(fields == 0, 0.0, 2.0 ** (fields.double() - 127 - 120))[:, :, 0]
    ratios = packed.ratios[0].double()
    rest = ratios.flip(1).cumprod(1).flip(1)[:, 1:]  # of each block the ratios after it
    assert ((ratios[:, 1:-1].abs() > 0.49) & (ratios[:, 1:-1].abs() < 2.01) | ratios[:, 1:-1].isnan()).all()
    found = rest.repeat_interleave(2, 0)[:5].repeat_interleave(2, 1) * powers
    wanted = w.scales.double().repeat_interleave(2, 0)[:5].repeat_interleave(2, 1)
    wanted[2:4, :4] = float("nan")  # a NaN reaches all sums of its rows
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found == 0, wanted == 0)
    good = ~(wanted.isnan() | (wanted == 0))
    assert ((found - wanted).abs()[good] <= 2.0**-21 * wanted.abs()[good]).all()
    w.scales[2, 3] = 2.0**8
    assert not fragments.suits(w)
    w.scales[2, 3] = float("inf")
    assert not fragments.suits(w)


def drawn(placement: Any, words: Any, element: str, shifts: Any, mask: int) -> torch.Tensor:
    """What `placement.moves` says of a pair, of words in int64."""
    held = [*words]
    if placement.words(element) == 2:
        held.append(held[0] + 4 * held[1] & 0xFFFFFFFF)
    elif placement.words(element) == 3:
        held.append(held[0] & placement.CHOSEN | held[1] << 2 & (0xFFFFFFFF ^ placement.CHOSEN))
    found = torch.zeros_like(held[0])
    for word, left, wraps in shifts:
        found = found ^ held[word] << left ^ (held[word] >> 32 - left if wraps else 0)
    return found & mask


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.scale != "e4m3"])
def test_the_hopper_kernels_decode_what_fragments_holds(layout: Any, name: str) -> None:
    """The kernel's rotations and masks, bit for bit, on integers: every code comes out where wgmma wants it."""
    fragments = import_module("microscale.backends.triton.fragments")
    placement = import_module("microscale.backends.triton.placement")
    w = suitable_bytes(name, (128, 128))
    w.scales.fill_(1 if w.scales.is_floating_point() else 127)
    element = w.format.element
    packed = fragments.pack(w).codes[0].long() & 0xFFFFFFFF
    if element.bits == 8:
        words = packed.view(2, 2, 2, 4, 8, 4, 4).movedim(2, 5)
    else:
        rest = packed[..., 512:].unflatten(2, (4, 8, 4, 2, -1))
        words = torch.cat((packed[..., :512].unflatten(2, (4, 8, 4, 2, 2)), rest), -1)

    found = [
        drawn(placement, words.unbind(-1), element.name, *pair) for pair in placement.moves(element.name)
    ]
    bits = torch.stack(found, -1)
    halves = torch.stack((bits << 16 & 0xFFFFFFFF, bits & 0xFFFF0000), -1)
    if element.exponent_bits:
        values = (halves - (halves >> 31 << 32)).int().view(torch.float32).double() * 2.0 ** (
            127 - element.bias
        )
    else:  # plus 128
        values = ((halves >> 16) - 128) * 2.0**-element.mantissa_bits
    # tile, chunk, warp, g, t, p, (q, h, odd row), odd column -> rows, columns
    values = values.unflatten(-2, (2, 2, 2)).permute(0, 2, 3, 8, 1, 5, 6, 7, 4, 9).reshape(128, 128)
    assert torch.equal(values, dequantize(w, torch.float64))


def executed(text: str, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The PTX instructions that unpacking is made of, on words in int64."""
    for line in filter(None, text.splitlines()):
        operation, rest = line.strip(";").split(" ", 1)
        name, *words = [word.strip() for word in rest.split(",")]
        a, *others = [held[w] if w in held else torch.tensor(int(w, 0)) for w in words]
        b, more = (others[0], others[1:]) if others else (a, [])
        if operation == "shl.b32":
            found = a << b
        elif operation == "shf.l.wrap.b32":
            assert torch.equal(a, b)
            found = a << more[0] | a >> 32 - more[0]
        elif operation == "and.b32":
            found = a & b
        elif operation == "mov.b32":
            found = a
        elif operation == "lop3.b32":
            found = torch.zeros_like(a | b | more[0])
            for i in range(8):
                if int(more[1]) >> i & 1:
                    found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (more[0] if i & 1 else ~more[0])
        else:
            assert operation == "mad.lo.u32", line
            found = a * b + more[0]
        held[name] = found & 0xFFFFFFFF
    return held


@pytest.mark.parametrize("element", sorted({fmt.element.name for fmt in FORMATS.values()}))
def test_the_instructions_bring_codes_to_bfloat16(layout: Any, element: str) -> None:
    """As `placement` says, for random words."""
    decode = import_module("microscale.backends.triton.hopper_decode")
    placement = import_module("microscale.backends.triton.placement")
    names = [f"w{i}" for i in range(placement.words(element))]
    words = torch.randint(2**32, (len(names), 1000), dtype=torch.int64)
    held = executed(decode._unpacking(element, names), dict(zip(names, words, strict=True)))
    for pair, name in zip(placement.moves(element), decode._PAIRS, strict=True):
        wanted = drawn(placement, words, element, *pair)
        assert torch.equal(held[name], wanted), name


def test_the_instructions_bring_scales_of_nvfp4_to_bfloat16(layout: Any) -> None:
    """Every scale in every place of a word, times what codes and the rows' factor miss."""
    decode = import_module("microscale.backends.triton.hopper_decode")
    fragments = import_module("microscale.backends.triton.fragments")
    fmt = FORMATS["nvfp4"]
    given = torch.stack([torch.arange(1, 127).roll(i) for i in range(4)], -1).to(torch.uint8)
    scales = given.view(63, 2, 4).repeat_interleave(32, 0).flatten(0, 1)  # a tile for each two rows
    words = fragments._scale_words(scales, fmt).view(63, 32, 2)[:, :, 0].long() & 0xFFFFFFFF
    held = executed(decode._E4M3.replace(".reg .b32 same;", "").format("w"), {"w": words})
    wanted = scales.view(63, 32, 2, 4).view(torch.float8_e4m3fn).to(torch.bfloat16) * 2.0**110
    for block, name in enumerate("st"):
        halves = torch.stack((held[name] & 0xFFFF, held[name] >> 16), -1)
        assert torch.equal(halves, wanted[..., block].view(torch.int16).long()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_wider_activations_are_sums_of_bfloat16(layout: Any, dtype: torch.dtype) -> None:
    as_parts = import_module("microscale.backends.triton.hopper").as_parts
    info = torch.finfo(dtype)
    special = [
        0.0,
        -0.0,
        info.max,
        -info.max,
        info.smallest_normal,
        float("inf"),
        -float("inf"),
        float("nan"),
    ]
    x = torch.cat((torch.randn(2000).to(dtype), torch.tensor(special, dtype=dtype)))[None]
    parts = as_parts(x)
    assert parts.shape == (1, 2 if dtype == torch.float16 else 3, x.shape[1])
    assert parts.dtype == torch.bfloat16
    usual = x.isfinite() & (x.abs() >= 2.0**-100)
    assert torch.equal(parts.double().sum(1)[usual], x.double()[usual])
    # Not inf - inf, and no NaN that became an infinity.
    assert torch.equal(parts[:, 0].isnan(), x.isnan())
    assert torch.equal(parts[:, 0].isinf(), x.isinf())
    assert (parts[:, 1:][~usual.expand(parts.shape[1] - 1, -1)[None]].abs() < 2.0**-100).all()


# w13's activations: kind, gated, interleaved, with a bias.
