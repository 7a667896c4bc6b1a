"""Held-out perplexity and sample completions: `python evaluate.py CHECKPOINT --data DIR`."""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from model import CONTEXT, mxfp4
from torch import Tensor
from transformers import AutoTokenizer, GptOssForCausalLM, Mxfp4Config, PreTrainedTokenizerFast

PROMPTS = (
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "class QueueTest(unittest.TestCase):\n    def setUp(self):\n",
    "import argparse\nimport os\nimport sys\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
)


def load(checkpoint: Path, dtype: torch.dtype, device: str, *, quantised: bool = False) -> GptOssForCausalLM:
    """The model through transformers' own, plainest code. `quantised`: its experts rounded to MXFP4."""
    stored = json.loads((checkpoint / "config.json").read_text()).get("quantization_config")
    model = GptOssForCausalLM.from_pretrained(
        checkpoint,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True) if stored else None,
    )
    if quantised:
        with torch.no_grad():
            for layer in model.model.layers:
                for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                    weight.copy_(mxfp4(weight))
    return model.to(device, dtype).eval()


def windows(ids: Tensor) -> Tensor:
    """[tokens] -> [windows, CONTEXT + 1]: each token but the first predicted once; a part window is dropped."""
    return ids[: (len(ids) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)


@torch.no_grad()
def mean_nats(model: GptOssForCausalLM, rows: Tensor, attention_mask: object = None) -> float:
    """Mean cross-entropy of the tokens predicted in `windows(...)`, in nats."""
    total = 0.0
    for ids in rows.to(model.device).split(8):
        logits = model(input_ids=ids[:, :-1], attention_mask=attention_mask, use_cache=False).logits
        total += F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / rows[:, 1:].numel()


def heldout_windows(data: Path, limit: int | None) -> tuple[Tensor, int]:
    """The windows of heldout.txt, and how many bytes of text their predicted tokens stand for."""
    tokenizer = AutoTokenizer.from_pretrained(data)
    text = (data / "heldout.txt").read_bytes().decode()
    rows = windows(torch.tensor(tokenizer(text, verbose=False)["input_ids"]))[:limit]
    # Byte-level: one character of a token's name is one byte. Boundaries are no text.
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    sizes = torch.tensor([0 if i in tokenizer.all_special_ids else len(name) for i, name in enumerate(names)])
    return rows, int(sizes[rows[:, 1:]].sum())


def perplexity(model: GptOssForCausalLM, rows: Tensor, size: int) -> dict[str, float]:
    nats = mean_nats(model, rows)
    bits = nats * rows[:, 1:].numel() / math.log(2)
    return {"perplexity": math.exp(nats), "nats_per_token": nats, "bits_per_byte": bits / size}


@torch.no_grad()
def expert_shares(model: GptOssForCausalLM, rows: Tensor) -> list[list[float]]:
    """For each layer, the part of all routed (token, expert) pairs that each expert gets."""
    out = model(input_ids=rows[:, :-1].to(model.device), use_cache=False, output_router_logits=True)
    experts, top_k = model.config.num_local_experts, model.config.num_experts_per_tok
    chosen = [logits.topk(top_k, dim=-1).indices.flatten() for logits in out.router_logits]
    return [[round(s, 4) for s in (c.bincount(minlength=experts) / len(c)).tolist()] for c in chosen]


def samples(
    model: GptOssForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int
) -> list[dict[str, str]]:
    """Each prompt continued greedily and at temperature 0.7."""
    ways = {"greedy": {"do_sample": False}, "t0.7": {"do_sample": True, "temperature": 0.7}}
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        row = {"prompt": prompt}
        for name, options in ways.items():
            mask = torch.ones_like(ids)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, **options)
            row[name] = tokenizer.decode(out[0, ids.shape[1] :])
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="where heldout.txt and the tokenizer are")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--windows", type=int, help="use only the first N windows")
    parser.add_argument("--tokens", type=int, default=0, help="also complete the prompts with N tokens each")
    args = parser.parse_args()
    model = load(args.checkpoint, getattr(torch, args.dtype), args.device)
    print(json.dumps(perplexity(model, *heldout_windows(args.data, args.windows))))
    if args.tokens:
        for row in samples(model, AutoTokenizer.from_pretrained(args.data), args.tokens):
            print(f"\n--- greedy\n{row['prompt']}{row['greedy']}\n--- t0.7\n{row['prompt']}{row['t0.7']}")


if __name__ == "__main__":
    main()
