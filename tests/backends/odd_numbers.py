"""Numbers that a rounding may get wrong; for the tests beside this file."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def odd_numbers(k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[7, k] of every size, also infinite, NaN, subnormal, zero and halfway ones."""
    size = torch.exp2(torch.randint(-20, 15, (7, k), generator=generator).float())
    x = (torch.randn(7, k, generator=generator) * size).to(dtype)
    powers = torch.exp2(torch.randint(-14, 3, (k,), generator=generator).float())
    x[1] = x[1].sign() * powers.to(dtype) * 1.0625
    x[2] = 0.0
    x[3, 0], x[4, -1] = math.inf, math.nan
    x[5] = torch.finfo(dtype).smallest_normal * torch.randint(0, 3, (k,), generator=generator).to(dtype) / 2
    x[6, 0] = torch.finfo(dtype).max
    return x
