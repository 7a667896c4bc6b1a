"""Where a decoded token's time goes, and how much of it the machine needs to read the weights at the least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from microscale.cli.output import human


@dataclass(frozen=True)
class Timing:
    """A decoded token, on average.

    Attributes:
        token: seconds.
        kernels: seconds of it inside the C++ core, or in our kernels, by what ran: "experts", "linears", "attention",
            "norms".
        bytes: of weights that it reads; activations and the key/value cache are left out.
        read_rate: bytes a second that the machine read between the tokens, the median; a GPU behind them.
        others: seconds of it in a GPU's other kernels; None: it ran on a CPU.
    """

    token: float
    kernels: dict[str, float]
    bytes: int
    read_rate: float
    others: float | None = None

    @property
    def outside(self) -> float:
        """Seconds in none of these kernels: Python, a CPU's other operators, a GPU that waits."""
        return self.token - sum(self.kernels.values()) - (self.others or 0.0)

    @property
    def of_floor(self) -> float:
        """The time that the machine needs to read the weights, as a fraction of a token's."""
        return self.bytes / self.read_rate / self.token

    def document(self) -> dict[str, Any]:
        """For JSON: seconds, bytes, bytes a second."""
        return {
            "token_seconds": self.token,
            "kernel_seconds": self.kernels,
            **({} if self.others is None else {"other_kernel_seconds": self.others}),
            "outside_seconds": self.outside,
            "weight_bytes_per_token": self.bytes,
            "read_rate": self.bytes / self.token,
            "ceiling_read_rate": self.read_rate,
            "of_floor": self.of_floor,
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds * 1e3:.3g}" for name, seconds in self.kernels.items())
        if self.others is not None:
            parts += f", kernels of others {self.others * 1e3:.3g}"
        return (
            f"a token takes {self.token * 1e3:.3g} ms: {parts}, all else {self.outside * 1e3:.3g}; "
            f"it reads {human(self.bytes)} at {self.bytes / self.token / 1e9:.3g} GB/s, "
            f"{self.of_floor:.2f} of the {self.read_rate / 1e9:.3g} GB/s that this machine read in between"
        )
