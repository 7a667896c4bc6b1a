"""`reference.moe` against the modules of transformers whose mathematics it states."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.activations import GPT_OSS, Activation
from microscale.quant import dequantize
from microscale.reference import moe
from token_loop import (
    SILU,
    assert_within,
    eps,
    expected_of,
    operands,
)


def filled(module: torch.nn.Module, **values: Tensor) -> torch.nn.Module:
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(value)
    return module


def config(e: int, h: int, i: int, t: int, **more: Any) -> Any:
    return SimpleNamespace(
        num_local_experts=e,
        num_experts=e,
        hidden_size=h,
        intermediate_size=i,
        moe_intermediate_size=i,
        num_experts_per_tok=t,
        hidden_act="silu",
        _experts_implementation="eager",
        **more,
    )


@pytest.mark.parametrize("limit", [7.0, 0.6])
def test_against_gpt_oss(limit: float) -> None:
    """The whole block, router and biases included."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    from microscale.routing import topk_softmax

    settings = GptOssConfig(num_local_experts=5, hidden_size=40, intermediate_size=24, num_experts_per_tok=3)
    settings._experts_implementation = "eager"
    assert (settings.swiglu_alpha, settings.swiglu_limit) == (GPT_OSS.alpha, GPT_OSS.limit)
    settings.swiglu_limit = limit
    args = operands("mxfp4", replace(GPT_OSS, limit=limit))
    block = GptOssMLP(settings).double()
    filled(
        block,
        **{
            "experts.gate_up_proj": dequantize(args["w13"], torch.float64).mT,
            "experts.gate_up_proj_bias": args["b13"],
            "experts.down_proj": dequantize(args["w2"], torch.float64).mT,
            "experts.down_proj_bias": args["b2"],
            "router.weight": torch.randn(5, 40),
            "router.bias": torch.randn(5),
        },
    )
    x = args["x"].double()
    with torch.no_grad():
        theirs, _ = block(x[None])
        logits, weights, ids = block.router(x)
    args |= {"x": x, "topk_ids": ids, "topk_weights": weights}
    _, bound = expected_of(args)
    assert_within(moe(**args, dtype=torch.float64), theirs[0], 2 * bound, torch.float64)
    # With our router the weights are float32, off by the rounding of the logits and a softmax over T.
    ours_ids, ours = topk_softmax(logits, 3)
    clear = (logits.sort(dim=1).values.diff(dim=1) > 1e-5).all(dim=1)
    assert torch.equal(ours_ids[clear], ids[clear])
    relative = (3 + 2 * float(logits.abs().max()) + 8) * eps(torch.float32)
    slots = [{**args, "topk_ids": ids[:, t : t + 1], "topk_weights": weights[:, t : t + 1]} for t in range(3)]
    magnitude = sum(expected_of(slot)[0].abs() for slot in slots)
    y = moe(**{**args, "topk_ids": ours_ids, "topk_weights": ours}, dtype=torch.float64)
    allowed = relative * magnitude + 2 * eps(torch.float64) * bound
    assert ((y - theirs[0]).abs() <= allowed)[clear].all()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "DeepseekV2", "DeepseekV3", "MiniMaxM2"])
def test_against_silu_experts(name: str) -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
    from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2Experts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    known = (DeepseekV2Experts, DeepseekV3Experts, MiniMaxM2Experts, MixtralExperts, Qwen3MoeExperts)
    against_experts({c.__name__: c for c in known}[f"{name}Experts"], SILU, config(5, 40, 24, 3))


def test_against_deepseek_v4_experts() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    against_experts(DeepseekV4Experts, Activation("silu", limit=0.6), config(5, 40, 24, 3, swiglu_limit=0.6))


def against_experts(experts: Any, a: Activation, settings: Any) -> None:
    args = {**operands("fp8_block128", a), "b13": None, "b2": None}
    args["x"] = args["x"].double()
    args["topk_weights"] = args["topk_weights"].double()
    module = filled(
        experts(settings).double(),
        gate_up_proj=dequantize(args["w13"], torch.float64),
        down_proj=dequantize(args["w2"], torch.float64),
    )
    with torch.no_grad():
        theirs = module(args["x"], args["topk_ids"], args["topk_weights"])
    _, bound = expected_of(args)
    assert_within(moe(**args, dtype=torch.float64), theirs, 2 * bound, torch.float64)


def test_against_llama4() -> None:
    """The whole block, less its shared expert: the weight goes onto the input."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    from microscale.routing import sigmoid_top1_on_input

    args = {**operands("mxfp8_e4m3", SILU, t=1), "b13": None, "b2": None, "weight_on_input": True}
    block = Llama4TextMoe(config(5, 40, 24, 1)).double()
    router = torch.randn(5, 40).double()
    filled(
        block,
        **{
            "experts.gate_up_proj": dequantize(args["w13"], torch.float64).mT,
            "experts.down_proj": dequantize(args["w2"], torch.float64).mT,
            "router.weight": router,
            "shared_expert.gate_proj.weight": torch.zeros(24, 40),
            "shared_expert.up_proj.weight": torch.zeros(24, 40),
            "shared_expert.down_proj.weight": torch.zeros(40, 24),
        },
    )
    x = args["x"].double()
    with torch.no_grad():
        theirs, logits = block(x[None])
        scores, _ = block.router(x)  # float32 sigmoids in a float64 model, 0 off the choice
    expected, expected_ids = scores.max(dim=1, keepdim=True)
    ids, weights = sigmoid_top1_on_input(logits)
    clear = logits.topk(2).values.diff(dim=1).abs()[:, 0] > 1e-5  # a tie in float32 may go either way
    assert torch.equal(ids[clear], expected_ids[clear])
    relative = (2 * float(logits.abs().max()) + 8) * eps(torch.float32)  # of exp's argument, and a few more
    assert ((weights - expected).abs() <= relative * expected)[clear].all()
    args |= {"x": x, "topk_ids": expected_ids, "topk_weights": expected}
    _, bound = expected_of(args)
    assert_within(moe(**args, dtype=torch.float64), theirs, 2 * bound, torch.float64)
