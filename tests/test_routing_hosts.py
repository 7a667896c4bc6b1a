"""The routers against those of transformers' models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.routing import ROUTERS
from scalar_routers import (
    UNDECIDED,
    bound,
    scalar,
)


def dense(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    return torch.zeros(len(ids), experts).scatter_add_(1, ids, weights.float())


def theirs(name: str, experts: int, top_k: int, **more: Any) -> Any:
    """A router module of transformers whose logits are its input: its weight is the identity."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
    from transformers.models.llama4.modeling_llama4 import Llama4Router
    from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    classes = (
        DeepseekV2TopkRouter,
        DeepseekV3TopkRouter,
        DeepseekV4TopKRouter,
        Glm4MoeTopkRouter,
        GptOssTopKRouter,
        Llama4Router,
        MiniMaxM2TopKRouter,
        MixtralTopKRouter,
        Qwen3MoeTopKRouter,
    )
    config = SimpleNamespace(
        num_experts=experts,
        num_local_experts=experts,
        hidden_size=experts,
        num_experts_per_tok=top_k,
        **more,
    )
    module = {c.__name__: c for c in classes}[name](config)
    with torch.no_grad():
        module.weight.copy_(torch.eye(experts))
    return module


V3 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
PEERS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("MixtralTopKRouter", {}, "softmax_topk", {}),
    ("Qwen3MoeTopKRouter", {"norm_topk_prob": True}, "softmax_topk", {"renormalize": True}),
    ("Qwen3MoeTopKRouter", {"norm_topk_prob": False}, "softmax_topk", {"renormalize": False}),
    ("GptOssTopKRouter", {}, "topk_softmax", {}),
    ("MiniMaxM2TopKRouter", {}, "sigmoid_topk", {"bias": True}),
    ("DeepseekV3TopkRouter", {**V3, "norm_topk_prob": True}, "grouped_sigmoid_topk",
     {"bias": True, "groups": 4, "topk_groups": 2, "renormalize": True, "scale": 2.5}),
    ("DeepseekV3TopkRouter", {**V3, "norm_topk_prob": False}, "grouped_sigmoid_topk",
     {"bias": True, "groups": 4, "topk_groups": 2, "renormalize": False, "scale": 2.5}),
    ("Glm4MoeTopkRouter", {**V3, "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
     "sigmoid_topk", {"bias": True, "scale": 2.5}),
    ("DeepseekV2TopkRouter", {**V3, "topk_method": "group_limited_greedy"}, "grouped_softmax_topk",
     {"groups": 4, "topk_groups": 2, "scale": 2.5}),
    ("DeepseekV2TopkRouter", {**V3, "topk_method": "greedy"}, "grouped_softmax_topk",
     {"groups": 1, "topk_groups": 1, "scale": 2.5}),
    ("DeepseekV4TopKRouter", {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5},
     "sqrt_softplus_topk", {"bias": True, "scale": 1.5}),
    ("Llama4Router", {}, "sigmoid_top1_on_input", {}),
]  # fmt: skip


@pytest.mark.parametrize(
    "peer, config, router, options", PEERS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_against_transformers(
    peer: str, config: dict[str, Any], router: str, options: dict[str, Any]
) -> None:
    experts, rows, top_k = 16, 200, 1 if peer == "Llama4Router" else 4
    module = theirs(peer, experts, top_k, **config)
    logits = torch.randn(rows, experts) * 2
    options = dict(options)
    bias = torch.randn(experts) * 0.3 if options.pop("bias", False) else None
    with torch.no_grad():
        if peer == "MiniMaxM2TopKRouter":
            _, weights, ids = module(logits, bias)
        elif peer == "Llama4Router":
            expected, _ = module(logits)
        else:
            if bias is not None:
                module.e_score_correction_bias.copy_(bias)
            _, weights, ids = module(logits)
    if peer != "Llama4Router":
        expected = dense(ids, weights, experts)
    ours = dense(
        *ROUTERS[router](logits, top_k, **options, **({} if bias is None else {"bias": bias})), experts
    )
    scalar_options = {**options, **({} if bias is None else {"bias": bias.tolist()})}
    decided = [scalar(router, row, top_k, **scalar_options)[2] > UNDECIDED for row in logits.tolist()]
    assert sum(decided) > rows / 2
    error = (ours - expected).abs()[decided]
    assert (error <= 2 * bound(experts, top_k, logits) * expected[decided]).all()
