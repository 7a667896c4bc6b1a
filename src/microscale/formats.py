"""The table of formats: how numbers are stored. A format is data; nothing here computes on tensors.

A stored number is `element code -> value`, times its block's scale, times (NVFP4 only) a tensor scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from microscale.errors import FormatError

OCP_MX = "OCP Microscaling Formats (MX) Specification v1.0"
OCP_FP8 = "OCP 8-bit Floating Point Specification (OFP8) v1.0"


@dataclass(frozen=True)
class Element:
    """One number's encoding: sign, exponent, mantissa, from the top bit down.

    Attributes:
        name: e.g. "e2m1".
        bits: total width.
        exponent_bits: 0 for a two's complement integer with an implied scale of 2^-mantissa_bits.
        mantissa_bits: explicit fraction bits.
        bias: exponent bias; the smallest normal is 2^(1 - bias).
        max: largest finite magnitude that an encoder writes.
        ieee_specials: top exponent field holds infinities and NaNs, as in IEEE 754 (E5M2).
        nan_code: magnitude code of the only NaN where there are no infinities (E4M3: 0x7F), else None.
        source: where the encoding is defined.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    source: str
    ieee_specials: bool = False
    nan_code: int | None = None

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number, which subnormals share."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """floor(log2(max)): what the scale rules subtract."""
        return self.max_parts[1]

    @property
    def max_parts(self) -> tuple[int, int]:
        """max = significand * 2^(emax - 23), with the significand in [2^23, 2^24): (its 23 fraction bits, emax)."""
        exponent = 0
        while 2.0 ** (exponent + 1) <= self.max:
            exponent += 1
        return int(self.max / 2.0**exponent * 2**23) - 2**23, exponent

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of every code, 0 .. 2^bits - 1."""
        return tuple(self.value(code) for code in range(2**self.bits))

    def value(self, code: int) -> float:
        """The number that one code stands for; NaN and infinities as Python floats."""
        if self.exponent_bits == 0:
            signed = code - 2**self.bits if code >= 2 ** (self.bits - 1) else code
            return float(signed / 2**self.mantissa_bits)
        magnitude = code & (2 ** (self.bits - 1) - 1)
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        field, fraction = divmod(magnitude, 2**self.mantissa_bits)
        if self.ieee_specials and field == 2**self.exponent_bits - 1:
            return sign * float("inf") if fraction == 0 else float("nan")
        if magnitude == self.nan_code:
            return float("nan")
        if field == 0:
            return float(sign * fraction * 2.0 ** (self.emin - self.mantissa_bits))
        return float(sign * (1 + fraction / 2**self.mantissa_bits) * 2.0 ** (field - self.bias))


E2M1 = Element("e2m1", 4, 2, 1, 1, 6.0, f"{OCP_MX}, 5.3.3")
E2M3 = Element("e2m3", 6, 2, 3, 1, 7.5, f"{OCP_MX}, 5.3.2")
E3M2 = Element("e3m2", 6, 3, 2, 3, 28.0, f"{OCP_MX}, 5.3.2")
E4M3 = Element("e4m3", 8, 4, 3, 7, 448.0, f"{OCP_FP8}, 4; {OCP_MX}, 5.3.1", nan_code=0x7F)
E5M2 = Element("e5m2", 8, 5, 2, 15, 57344.0, f"{OCP_FP8}, 4; {OCP_MX}, 5.3.1", ieee_specials=True)
# Two's complement 1.6 fixed point. -128 (-2.0) decodes, but an encoder stays symmetric and never writes it.
INT8 = Element("int8", 8, 0, 6, 0, 127 / 64, f"{OCP_MX}, 5.3.4")

# How a block's amax becomes its scale. The first three are for E8M0 and give the exponent e of 2^e:
#   even   floor(log2(amax rounded half up to the element's mantissa bits)) - emax   (Quark, triton_kernels)
#   floor  floor(log2(amax)) - emax                                                 (OCP MX v1.0, 6.3)
#   ceil   ceil(log2(amax / max)); never saturates                                  (MXFP8 producers)
#   amax   amax / max, in the scale's own encoding                                  (NVFP4, block FP8)
MX_RULES = ("even", "floor", "ceil")


@dataclass(frozen=True)
class Format:
    """How a tensor of numbers is stored.

    Attributes:
        name: the word used everywhere, from files to the command line.
        element: encoding of one number.
        block: (rows, columns) that share one scale; columns run along K.
        scale: "e8m0" (a byte, 2^(b-127), 255 is NaN), "e4m3" (a byte) or "f32".
        tensor_scale: an outer float32 multiplier exists (NVFP4).
        rules: scale rules that `quantize` accepts, the default first.
        source: where the format is defined.
    """

    name: str
    element: Element
    block: tuple[int, int]
    scale: str
    tensor_scale: bool
    rules: tuple[str, ...]
    source: str

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale."""
        return 4 if self.scale == "f32" else 1

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for one number, its share of the block scale included."""
        return self.element.bits + 8 * self.scale_bytes / (self.block[0] * self.block[1])

    def packed_columns(self, k: int) -> int:
        """Bytes that the codes of one row of `k` numbers take."""
        return -(-k * self.element.bits // 8)

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scales of an [n, k] matrix; ragged last blocks count as blocks."""
        return -(-n // self.block[0]), -(-k // self.block[1])


def _mx(name: str, element: Element) -> Format:
    return Format(name, element, (1, 32), "e8m0", False, MX_RULES, f"{OCP_MX}, table 1")


# Formats of weights.
FORMATS: MappingProxyType[str, Format] = MappingProxyType(
    {
        f.name: f
        for f in (
            _mx("mxfp4", E2M1),
            _mx("mxfp6_e2m3", E2M3),
            _mx("mxfp6_e3m2", E3M2),
            _mx("mxfp8_e4m3", E4M3),
            _mx("mxfp8_e5m2", E5M2),
            _mx("mxint8", INT8),
            Format("nvfp4", E2M1, (1, 16), "e4m3", True, ("amax",), "NVIDIA, Introducing NVFP4 (2025)"),
            Format(
                "fp8_block128", E4M3, (128, 128), "f32", False, ("amax",), "DeepSeek-V3 report (2024), 3.3.2"
            ),
        )
    }
)

# Block FP8 quantises activations along K only: one scale per token and 128 columns.
FP8_GROUP128 = Format(
    "fp8_group128", E4M3, (1, 128), "f32", False, ("amax",), "DeepSeek-V3 report (2024), 3.3.2"
)

_ACTIVATIONS = {"a8": "mxfp8_e4m3", "a6": "mxfp6_e2m3", "a4": "mxfp4"}
_ACTIVATION_EXCEPTIONS = {
    ("fp8_block128", "a8"): "fp8_group128",
    ("nvfp4", "a4"): "nvfp4",
    ("mxfp6_e3m2", "a6"): "mxfp6_e3m2",
    ("mxfp8_e5m2", "a8"): "mxfp8_e5m2",
}


def get_format(name: str | Format) -> Format:
    """The record of a name.

    Raises:
        FormatError: unknown name; the message lists the known ones.
    """
    if isinstance(name, Format):
        return name
    if name == FP8_GROUP128.name:
        return FP8_GROUP128
    if name not in FORMATS:
        raise FormatError(f"unknown format {name!r}; known: {', '.join(FORMATS)}, {FP8_GROUP128.name}")
    return FORMATS[name]


def activation_word(act: Format | None) -> str:
    """What a `Problem` calls it: the format's name, or "a16" for activations that stay as they are."""
    return "a16" if act is None else act.name


def activation_format(weight: str, act: str) -> Format | None:
    """What `act` means beside weights in format `weight`: None for "a16" (activations stay 16-bit).

    `act` is "a16", "a8", "a6", "a4", or a format's name. "a8" with block FP8 is one scale per token and
    128 columns; otherwise the MX format of that width, or the weight's own where that has the width.

    Raises:
        FormatError: neither.
    """
    if act == "a16":
        return None
    name = _ACTIVATION_EXCEPTIONS.get((weight, act), _ACTIVATIONS.get(act, act))
    fmt = get_format(name)
    if fmt.block[0] != 1:
        raise FormatError(f"{name} shares a scale between {fmt.block[0]} rows and cannot hold activations")
    return fmt
