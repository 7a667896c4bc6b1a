"""The non-linearity between an expert's two products, as data. `reference` and each backend compute it."""

from __future__ import annotations

from dataclasses import dataclass

from microscale.errors import FormatError

# With g the gate and u the up half (u is absent where `gated` is False, and the factor with it), L the limit:
#   silu         silu(min(g, L)) * clamp(u, -L, L)                   L absent: plain SwiGLU
#   swiglu_oai   g' * sigmoid(alpha * g') * (clamp(u, -L, L) + beta), g' = min(g, L)        gpt-oss
#   swiglu_step  min(silu(g), L) * clamp(u, -L, L)
#   situ         beta * tanh(g / beta) * sigmoid(g) * alpha * tanh(u / alpha)   alpha is the linear half's bound
#   gelu         gelu(g) * u, with erf          gelu_tanh: its tanh approximation
#   relu2        relu(g)^2 * u
KINDS = ("silu", "swiglu_oai", "swiglu_step", "situ", "gelu", "gelu_tanh", "relu2")
_LIMITED = ("silu", "swiglu_oai", "swiglu_step")


@dataclass(frozen=True)
class Activation:
    """What happens between w13 and w2.

    Attributes:
        kind: one of `KINDS`.
        gated: w13 holds gate and up (2I rows); False: only I rows, and the result is the kind's function of them.
        interleaved: w13's rows alternate gate, up, gate, up (gpt-oss); False: all gates, then all ups.
        alpha, beta: parameters of swiglu_oai and situ; ignored, and required to be default, elsewhere.
        limit: clamp bound L of silu, swiglu_oai, swiglu_step; None: no clamp.
    """

    kind: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FormatError(f"unknown activation {self.kind!r}; known: {', '.join(KINDS)}")
        if self.kind not in ("swiglu_oai", "situ") and (self.alpha, self.beta) != (1.0, 0.0):
            raise FormatError(f"{self.kind} has no alpha or beta (got {self.alpha}, {self.beta})")
        if self.kind == "situ" and (self.alpha == 0 or self.beta == 0):
            raise FormatError("situ divides by alpha and beta; neither may be 0")
        if self.limit is not None and (self.kind not in _LIMITED or not self.limit > 0):
            raise FormatError(f"{self.kind} cannot take limit {self.limit}")
        if not self.gated and self.interleaved:
            raise FormatError("an activation without a gate has nothing to interleave")
        if not self.gated and self.kind in ("swiglu_oai", "situ", "swiglu_step"):
            raise FormatError(f"{self.kind} needs a gate")

    @property
    def apart(self) -> bool:
        """Whether w13 has all gates, and then all ups."""
        return self.gated and not self.interleaved

    def rows(self, intermediate: int) -> int:
        """Rows of w13 for an intermediate size."""
        return 2 * intermediate if self.gated else intermediate


GPT_OSS = Activation("swiglu_oai", interleaved=True, alpha=1.702, beta=1.0, limit=7.0)
