"""Master weights to a gpt-oss checkpoint with MXFP4 experts: `python export.py MASTER OUT --data DIR`."""

import argparse
import json
import shutil
from pathlib import Path
from string import Template

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from microscale import quantize

MAX_BYTES = 8_000_000
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def gpt_oss_layout(name: str, w: Tensor) -> dict[str, Tensor]:
    """The tensors that stand for parameter `name` in a gpt-oss checkpoint.

    Expert matrices, [E, K, N] in transformers, become blocks [E, N, K / 32, 16] (two codes a byte, the even k
    in the low nibble) and scales [E, N, K / 32] (E8M0). Gate and up rows stay interleaved: gate is even.
    """
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: w.to(torch.bfloat16).contiguous()}
    q = quantize(w.transpose(1, 2).contiguous(), "mxfp4", rule="even")
    return {f"{name}_blocks": q.codes.unflatten(-1, (-1, 16)).contiguous(), f"{name}_scales": q.scales}


def read_master(master: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in sorted(master.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def model_card(master: Path, data: Path) -> str:
    """`model_card.md` filled in from metrics.json and the list of held-out files."""
    metrics = json.loads((master / "metrics.json").read_text())
    files = json.loads((data / "heldout_files.json").read_text())
    run, versions, heldout = metrics["run"], metrics["versions"], metrics["heldout"]
    values = {
        "python": files["python"],
        "parameters": f"{metrics['parameters'] / 1e6:.2f}",
        "training_tokens": f"{metrics['training_tokens'] / 1e6:.2f}",
        "seen_tokens": f"{run.get('tokens', 0) / 1e6:.0f}",
        "epochs": f"{run['epochs']:.1f}",
        "minutes": f"{run.get('train_seconds', 0) / 60:.1f}",
        "device": metrics["device"],
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "seed": metrics["settings"]["seed"],
        "windows": heldout["windows"],
        "predicted_tokens": heldout["predicted_tokens"],
        "shipped": "\n".join(f"- `{path}`" for path in files["shipped"]),
        "others": ", ".join(f"`{path}`" for path in files["files"] if path not in files["shipped"]),
    }
    for experts in ("bf16", "mxfp4"):
        for compute in ("float32", "bfloat16"):
            measured = metrics[f"{experts}_experts_{compute}_compute"]
            values[f"{experts}_{compute}"] = f"{measured['perplexity']:.4f} | {measured['bits_per_byte']:.4f}"
    return Template((Path(__file__).parent / "model_card.md").read_text()).substitute(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("master", type=Path, help="what train.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="what corpus.py wrote")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    tensors: dict[str, Tensor] = {}
    for name, w in read_master(args.master).items():
        tensors |= gpt_oss_layout(name, w)
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((args.master / "config.json").read_text()) | {"quantization_config": QUANTIZATION}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copyfile(args.master / "generation_config.json", args.out / "generation_config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "heldout.txt"):
        shutil.copyfile(args.data / name, args.out / name)
    (args.out / "README.md").write_text(model_card(args.master, args.data))

    size = sum(f.stat().st_size for f in args.out.iterdir())
    for file in sorted(args.out.iterdir()):
        print(f"{file.stat().st_size:9d}  {file.name}")
    print(f"{size:9d}  bytes in all, of at most {MAX_BYTES}")
    if size > MAX_BYTES:
        raise SystemExit("too large")


if __name__ == "__main__":
    main()
