"""Trains the model for a given time: `python train.py --data DIR --out OUT --minutes 7.5`."""

import argparse
import json
import platform
import random
import time
from pathlib import Path

import torch
import transformers
from evaluate import expert_shares, heldout_windows, load, perplexity, samples
from model import CONTEXT, config
from trainer import Trainer, profile, train
from transformers import AutoTokenizer, GptOssForCausalLM

START = time.monotonic()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="what corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything, from start to end")
    parser.add_argument("--reserve", type=float, default=60, help="seconds of it kept for the end")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64, help="sequences per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--profile-seconds", type=float, help="time some batch sizes instead of training")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="tiny and eager: does everything run?")
    args = parser.parse_args()
    args.length, args.limit, args.new_tokens = CONTEXT, None, 160
    if args.smoke:
        args.batch, args.reserve, args.length, args.limit, args.new_tokens = 2, 15, 128, 1, 8
        args.eager = True
    elif args.profile_seconds:
        args.new_tokens = 40
    return args


def save(trained: GptOssForCausalLM, out: Path) -> None:
    """The master weights in bfloat16, as a plain checkpoint in shards below 15 MB."""
    model = GptOssForCausalLM(config())
    model.load_state_dict(trained.state_dict())
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="14MB")


def evaluate(args: argparse.Namespace) -> dict[str, object]:
    """Held-out perplexity of the saved checkpoint: experts as saved and as MXFP4, in two compute dtypes."""
    rows, size = heldout_windows(args.data, args.limit)
    found: dict[str, object] = {
        "heldout": {"windows": len(rows), "predicted_tokens": rows[:, 1:].numel(), "bytes": size}
    }
    for dtype in ("float32", "bfloat16"):
        for experts in ("bf16", "mxfp4"):
            model = load(args.out, getattr(torch, dtype), args.device, quantised=experts == "mxfp4")
            found[f"{experts}_experts_{dtype}_compute"] = perplexity(model, rows, size)
    found["expert_shares"] = expert_shares(model, rows[:8])
    torch.manual_seed(0)
    found["samples"] = samples(model, AutoTokenizer.from_pretrained(args.data), args.new_tokens)
    return found


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def log(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        (args.out / "train.log").write_text("\n".join(lines) + "\n")

    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "out")}
    modules = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions = {"python": platform.python_version(), **modules}
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    log(f"{name}  {versions}  {settings}")

    trainer = Trainer(args)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    log(f"{parameters} parameters, {len(trainer.tokens)} training tokens")
    log(f"ready after {time.monotonic() - START:.1f} s")
    if args.profile_seconds:
        run = profile(trainer, START + args.profile_seconds, log)
    else:
        run = train(trainer, START + 60 * args.minutes - args.reserve, log)
    save(trainer.model, args.out)
    log(f"saved after {time.monotonic() - START:.1f} s")

    measured = evaluate(args)
    for key, value in measured.items():
        if key != "samples":
            log(f"{key}: {value}")
    for row in measured["samples"]:
        log(f"--- greedy\n{row['prompt']}{row['greedy']}\n--- temperature 0.7\n{row['prompt']}{row['t0.7']}")
    run["wall_seconds"] = round(time.monotonic() - START, 1)
    run["epochs"] = round(run.get("tokens", 0) / len(trainer.tokens), 2)
    facts = {"device": name, "versions": versions, "settings": settings, "parameters": parameters}
    metrics = {**facts, "training_tokens": len(trainer.tokens), "run": run, **measured}
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    log(f"done after {run['wall_seconds']} s")


if __name__ == "__main__":
    main()
