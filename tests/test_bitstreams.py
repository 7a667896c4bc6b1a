"""How codes lie in bytes: hand-worked bytes, and exact inverses for every length."""

from __future__ import annotations

import pytest
import torch

import integer_oracle as oracle
from microscale import FormatError
from microscale.elements import BITSTREAMS, decode, pack_codes, unpack_codes
from microscale.formats import E2M1, E2M3

STREAMS = [(4, "little"), (6, "little"), (6, "quark_0.9"), (8, "little")]
by_stream = pytest.mark.parametrize("bits, stream", STREAMS, ids=[f"{b}bit-{s}" for b, s in STREAMS])


def u8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def quark_09(codes: list[int]) -> list[int]:
    """Whole groups of the older Quark stream, by writing the bits down."""
    packed = []
    for i in range(0, len(codes), 4):
        bits = [f"{v:06b}" for v in codes[i : i + 4]]
        text = "".join(b[:2] for b in bits) + "".join(b[2:] for b in bits)
        packed += [int(text[j : j + 8], 2) for j in (0, 8, 16)]
    return packed


# v0..v3 = 10 1101, 01 0011, 11 1010, 00 0111
@pytest.mark.parametrize(
    "stream, packed", [("little", (0xED, 0xA4, 0x1F)), ("quark_0.9", (0x9C, 0xD3, 0xA7))], ids=BITSTREAMS
)
def test_six_bit_by_hand(stream, packed):
    codes = u8(0x2D, 0x13, 0x3A, 0x07)
    assert pack_codes(codes, 6, stream).tolist() == list(packed)
    assert unpack_codes(u8(*packed), 6, 4, stream).tolist() == codes.tolist()


def test_four_bit_by_hand_low_nibble_is_even_k():
    assert pack_codes(u8(0x1, 0xF, 0x8, 0x7, 0x5), 4).tolist() == [0xF1, 0x78, 0x05]
    assert unpack_codes(u8(0xF1, 0x78, 0x05), 4, 5).tolist() == [0x1, 0xF, 0x8, 0x7, 0x5]
    # 0.5, -6, -0, 6, 3
    assert decode(u8(0xF1, 0x78, 0x05), E2M1, 5).tolist() == [0.5, -6.0, -0.0, 6.0, 3.0]


def test_eight_bit_is_the_codes():
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, 8), codes)
    assert torch.equal(unpack_codes(codes, 8, 256), codes)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("stream", BITSTREAMS)
def test_six_bit_every_code_in_every_position(stream, position):
    for code in range(64):
        codes = [0x3F ^ code] * 4
        codes[position] = code
        want = list(oracle.pack(codes, 6)) if stream == "little" else quark_09(codes)
        assert pack_codes(u8(*codes), 6, stream).tolist() == want
        assert unpack_codes(u8(*want), 6, 4, stream).tolist() == codes


@pytest.mark.parametrize("k", [*range(10), 31, 32, 33, 2880])
@by_stream
def test_unpack_inverts_pack(bits, stream, k):
    codes = torch.randint(0, 2**bits, (2, 3, k), dtype=torch.uint8)
    before = codes.clone()
    packed = pack_codes(codes, bits, stream)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, k, stream), codes)
    assert torch.equal(codes, before)
    if stream == "little":
        want = [[list(oracle.pack(row, bits)) for row in matrix] for matrix in codes.tolist()]
        assert packed.tolist() == want
    else:
        # Byte 0 has bits of all four codes, byte 1 of the first two, byte 2 of the last two.
        assert packed.shape == (2, 3, k // 4 * 3 + (0, 2, 2, 3)[k % 4])
        padded = [[row + [0] * (-k % 4) for row in matrix] for matrix in codes.tolist()]
        assert packed.tolist() == [[quark_09(row)[: packed.shape[-1]] for row in m] for m in padded]


@by_stream
def test_pack_inverts_unpack(bits, stream):
    packed = torch.randint(0, 256, (5, 240), dtype=torch.uint8)
    codes = unpack_codes(packed, bits, 240 * 8 // bits, stream)
    assert int(codes.max()) < 2**bits
    assert torch.equal(pack_codes(codes, bits, stream), packed)


@by_stream
def test_strided_input(bits, stream):
    codes = torch.randint(0, 2**bits, (24, 10), dtype=torch.uint8)
    packed = pack_codes(codes.T, bits, stream)
    assert torch.equal(packed, pack_codes(codes.T.contiguous(), bits, stream))
    strided = packed.repeat_interleave(2, dim=-1)[:, ::2]
    assert torch.equal(unpack_codes(strided, bits, 24, stream), codes.T)


def test_the_streams_differ():
    codes = torch.arange(64, dtype=torch.uint8)
    assert not torch.equal(pack_codes(codes, 6, "little"), pack_codes(codes, 6, "quark_0.9"))


def test_decode_reads_the_little_stream():
    codes = torch.arange(64, dtype=torch.uint8)
    assert decode(pack_codes(codes, 6), E2M3, 64).tolist() == list(E2M3.values)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("stream", ["big", "quark", ""])
def test_unknown_bitstream(bits, stream):
    for function in (lambda: pack_codes(u8(1), bits, stream), lambda: unpack_codes(u8(1), bits, 1, stream)):
        with pytest.raises(FormatError, match=f"'{stream}'.*little, quark_0.9"):
            function()
