"""One training step, the schedule by the clock, and the loop."""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from evaluate import mean_nats, windows
from model import CONTEXT, attention_masks, build, config, loss, requantise
from torch import Tensor

WARM_UP, DECAY_FROM, QUANTISE_FROM = 0.03, 0.4, 0.65  # parts of the training time
UNEVEN_WEIGHT = 0.01
PROFILE_STEPS = 20


class Trainer:
    """The model, its optimiser, the tokens, and one `step`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.model = build(args.dropout).to(self.device).train()
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if p.dim() > 1 and not n.endswith("bias")]
        others = [p for n, p in named if p.dim() == 1 or n.endswith("bias")]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        fused = self.device.type == "cuda"
        self.optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=fused)
        # The first call with output_router_logits installs hooks, which cannot be traced.
        with torch.no_grad():
            loss(self.model, torch.zeros(1, 9, dtype=torch.long, device=self.device), self.masks(8))
        self.loss = loss if args.eager else torch.compile(loss, fullgraph=True, dynamic=False)
        files = (np.fromfile(args.data / f"{name}.bin", np.uint16) for name in ("train", "heldout"))
        self.tokens, self.heldout = (torch.from_numpy(f.astype(np.int64)).to(self.device) for f in files)
        self.train_masks, self.window_masks = self.masks(args.length), self.masks(CONTEXT)

    def masks(self, length: int) -> dict[str, Tensor | None]:
        return attention_masks(length, config().sliding_window, self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def learning_rate(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def step(self, batch: int) -> Tensor:
        """One update from random crops; returns (cross-entropy, unevenness) without waiting for them."""
        starts = torch.randint(len(self.tokens) - self.args.length, (batch, 1), device=self.device)
        ids = self.tokens[starts + torch.arange(self.args.length + 1, device=self.device)]
        with self.autocast():
            nats, uneven = self.loss(self.model, ids, self.train_masks)
        (nats + UNEVEN_WEIGHT * uneven).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return torch.stack((nats.detach(), uneven.detach()))

    def heldout_nats(self) -> float:
        self.model.eval()
        with self.autocast():
            nats = mean_nats(self.model, windows(self.heldout)[: self.args.limit], self.window_masks)
        self.model.train()
        return nats


def schedule(done: float) -> float:
    """Learning rate, as a part of the highest, when `done` of the time is over: up, flat, down to 0."""
    return min(1.0, done / WARM_UP, max(0.0, (1 - done) / (1 - DECAY_FROM)))


def train(trainer: Trainer, deadline: float, log: Callable[[str], None]) -> dict[str, float]:
    """Steps until `deadline` (of time.monotonic) and returns how many steps, tokens and seconds that was."""
    args = trainer.args
    start = time.monotonic()
    trainer.learning_rate(0.0)
    trainer.step(args.batch)  # compiles, before the schedule's clock starts
    trainer.synchronise()
    begin = now = time.monotonic()
    log(f"first step took {begin - start:.1f} s; {deadline - begin:.1f} s for training")
    steps, shown, mxfp4, next_log, next_heldout = 0, 0, False, begin + 30, begin + 120
    sums = torch.zeros(2, device=trainer.device)
    while now < deadline:
        done = (now - begin) / (deadline - begin)
        mxfp4 = done > QUANTISE_FROM
        if mxfp4:
            requantise(trainer.model)
        trainer.learning_rate(args.lr * schedule(done))
        sums += trainer.step(args.batch)
        steps += 1
        if steps % 10 == 0:
            trainer.synchronise()  # the clock must not run ahead of the work
        now = time.monotonic()
        if now >= next_log or now >= deadline:
            nats, uneven = (sums / (steps - shown)).tolist()
            tokens = steps * args.batch * args.length
            log(
                f"{now - begin:5.0f} s  step {steps}  {tokens / 1e6:.1f} M tokens  "
                f"{tokens / (now - begin):.0f} tokens/s  loss {nats:.4f}  uneven {uneven:.3f}  "
                f"lr {args.lr * schedule(done):.1e}  mxfp4 {mxfp4}"
            )
            shown, next_log = steps, now + 30
            sums.zero_()
        if now >= next_heldout:
            log(f"{now - begin:5.0f} s  held-out loss {trainer.heldout_nats():.4f}")
            next_heldout = now + 120
    log(f"{now - begin:5.0f} s  held-out loss {trainer.heldout_nats():.4f}")
    tokens = steps * args.batch * args.length
    return {"steps": steps, "tokens": tokens, "train_seconds": round(now - begin, 1)}


def profile(trainer: Trainer, deadline: float, log: Callable[[str], None]) -> dict[str, float]:
    """Times steps of several batch sizes, each compiled anew, while there is time, and the MXFP4 rounding."""
    args, steps = trainer.args, 0
    for batch in dict.fromkeys((args.batch, 2 * args.batch, args.batch // 2)):
        start = time.monotonic()
        trainer.learning_rate(args.lr * WARM_UP)
        first = trainer.step(batch)
        trainer.synchronise()
        begin = time.monotonic()
        for _ in range(PROFILE_STEPS):
            last = trainer.step(batch)
        trainer.synchronise()
        end = time.monotonic()
        rate = PROFILE_STEPS * batch * args.length / (end - begin)
        memory = torch.cuda.max_memory_allocated() / 1e9 if trainer.device.type == "cuda" else 0.0
        steps += PROFILE_STEPS + 1
        log(
            f"batch {batch}: first step {begin - start:.1f} s, then {(end - begin) / PROFILE_STEPS:.4f} s, "
            f"{rate:.0f} tokens/s, {memory:.1f} GB, loss {first[0]:.3f} -> {last[0]:.3f}"
        )
        if end + 1.2 * (end - start) > deadline:
            break
    for name in ("first", "second"):
        begin = time.monotonic()
        requantise(trainer.model)
        trainer.synchronise()
        log(f"{name} requantise: {(time.monotonic() - begin) * 1e3:.1f} ms")
    log(f"held-out loss {trainer.heldout_nats():.4f}")
    return {"steps": steps}
