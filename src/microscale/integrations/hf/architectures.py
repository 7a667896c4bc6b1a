"""The architectures whose tokens our kernels take through all layers, each described once: for CUDA and for the CPU.

All are a norm, attention, a norm, and an MLP or experts, each added to the stream; transformers spells their modules
alike. They are known by their classes' names, so that asking imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from microscale.integrations.hf.attention import NAME


@dataclass(frozen=True)
class Kind:
    """How an architecture differs from its relatives.

    Attributes:
        prefix: its classes' names are this and "ForCausalLM", "Attention", "RMSNorm" ...
        attention: words for transformers' `attn_implementation` for which a step may stand; the first is the default.
        twice: norms round before they multiply by their weight, too.
        head_norms: each head of a query and a key gets a norm.
        sinks: heads have sinks.
        sparse: what the class of a layer of experts is called behind the prefix.
        router: what such a layer calls its router.
        rule: of the router, a function of `microscale.routing`; `norm_topk_prob` of the router: it renormalizes.
        shares: the dtype of routes' weights; None: the model's.
    """

    prefix: str
    attention: tuple[str, ...] = ("sdpa", "eager")
    twice: bool = True
    head_norms: bool = False
    sinks: bool = False
    sparse: str = "SparseMoeBlock"
    router: str = "gate"
    rule: str = "softmax_topk"
    shares: torch.dtype | None = None


# By `model_type`.
KINDS = {
    "gpt_oss": Kind(
        "GptOss", (NAME,), twice=False, sinks=True, sparse="MLP", router="router", rule="topk_softmax"
    ),
    "llama": Kind("Llama"),
    "mistral": Kind("Mistral"),
    "mixtral": Kind("Mixtral", shares=torch.float32),
    "qwen2": Kind("Qwen2"),
    "qwen3": Kind("Qwen3", head_norms=True),
    "qwen3_moe": Kind("Qwen3Moe", head_norms=True),
}
