"""How a backend's hardware adds up products, as data: what `tolerance` needs to know beyond the dtypes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accumulation:
    """One kind of adder.

    A matrix instruction of the coarse kind adds `addends` numbers at once: it shifts them to the exponent of the
    largest and cuts what lies more than `fraction_bits` below it. Every `promoted` numbers the kernel adds the
    result to a float32 sum.

    Attributes:
        name: for people.
        fraction_bits: bits kept below the largest addend; 0: ordinary float32 additions, and the rest is unused.
        addends: numbers that one instruction adds, the running sum among them.
        promoted: products between two additions in float32.
        source: where this is measured or specified.
    """

    name: str
    fraction_bits: int = 0
    addends: int = 0
    promoted: int = 0
    source: str = ""

    @property
    def coarse(self) -> bool:
        """Whether sums lose more than float32 additions would."""
        return self.fraction_bits > 0

    @property
    def sentence(self) -> str:
        """For people."""
        if not self.coarse:
            return "products are summed in float32"
        kept = f"{self.fraction_bits} bits below the largest addend are kept"
        return f"products are summed by {self.name}: {kept}, and float32 takes over every {self.promoted}"

    @property
    def deviation(self) -> float:
        """Standard deviation of one output's error, as a fraction of the root of the sum of its squared products.

        Each of the `addends` of each instruction is cut by less than g = 2^-fraction_bits of the largest, and the cuts
        of numbers of either sign are independent: within (-g, g), of variance g^2 / 3 at the most. The largest is
        the running sum or a product. Squared, either is on average no more than the sum of squares of what is added
        between two promotions; and those sums of squares add up to the whole one.
        """
        if not self.coarse:
            return 0.0
        cuts = self.promoted / (self.addends - 1) * self.addends
        return float(2.0**-self.fraction_bits * (cuts / 3.0) ** 0.5)


FLOAT32 = Accumulation("float32")
HOPPER_FP8 = Accumulation(
    "FP8 tensor cores of sm_89 and sm_90",
    fraction_bits=13,
    addends=33,
    promoted=128,
    source="DeepSeek-V3 report (2024), 3.3.2: about 14 bits of a sum remain; promoted every 128 products",
)


def of_fp8_codes(device: str, capability: int) -> Accumulation:
    """How matrix units add up products of FP8 codes; `capability`: of a CUDA GPU, 90 for sm_90."""
    return HOPPER_FP8 if device == "cuda" and capability in (89, 90) else FLOAT32
