"""The likeliest token of a vocabulary's logits: in one kernel, since the next step waits for it (see `hf.ahead`).

Each program finds the greatest of its logits, and the one that comes last that of all. The slow twin is `torch.argmax`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from microscale.backends.triton import tiles
from microscale.backends.triton.keys import keys_of, place_of

_BLOCK = 2048  # logits of a program


@triton.jit
def _likeliest_kernel(ids, logits, keys, arrived, V, logits_b, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    row, part, parts = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.num_programs(0)
    mine = keys + row * parts
    best = tl.max(keys_of(logits + row * logits_b, part * BLOCK + tl.arange(0, BLOCK), V, 32), 0)
    tl.store(mine + part, best)
    tl.debug_barrier()  # the store and the release may be of two threads
    if tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu") == parts - 1:
        tl.store(arrived + row, 0)  # for the next launch
        i = tl.arange(0, PARTS)
        # From where the stores of other programs met.
        every = tl.load(mine + i, mask=i < parts, other=-(1 << 63), cache_modifier=".cg")
        tl.store(ids + row, place_of(tl.max(every, 0), 32))


class Likeliest:
    """Chooses for a batch, whose memory it keeps; one choice at a time."""

    def __init__(self, ids: Tensor) -> None:
        """ids: int64 [B, 1], contiguous, which choices are written to."""
        self.ids, self._keys = ids, torch.empty(0, dtype=torch.int64, device=ids.device)
        self._arrived = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)

    def choose(self, logits: Tensor) -> None:
        """By logits [B, V] with columns side by side; the first of equal ones, and a NaN before any."""
        batch, vocabulary = logits.shape
        parts = -(-vocabulary // _BLOCK)
        if self._keys.numel() < batch * parts:
            self._keys = torch.empty(batch * parts, dtype=torch.int64, device=logits.device)
        with tiles.on(logits.device):
            _likeliest_kernel[(parts, batch)](
                self.ids, logits, self._keys, self._arrived, vocabulary, logits.stride(0), BLOCK=_BLOCK,
                PARTS=triton.next_power_of_2(parts), **tiles.launch(early=False),
            )  # fmt: skip
