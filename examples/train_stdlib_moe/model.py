"""The architecture, and the forms of its experts and attention that training uses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, GptOssConfig, GptOssForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from microscale import dequantize, quantize

CONTEXT = 1024
# Keys put before the tokens' own: the last stands for the sink, the others for nothing. With eight of them
# the rows of a mask stay aligned to 16 bytes, which fused attention wants.
SLOTS = 8
VOID = -1e4


def config() -> GptOssConfig:
    return GptOssConfig(
        vocab_size=2048,
        hidden_size=288,
        intermediate_size=192,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "full_attention"] * 3,
        sliding_window=128,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        attention_bias=True,
        num_local_experts=8,
        num_experts_per_tok=2,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
    )


def dense_experts(self: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every expert on every token, as two plain matmuls: four times the arithmetic, but a static graph.

    Args:
        x: [M, H].
        top_k_index, top_k_weights: [M, T]. Experts that were not chosen get weight 0.
    """
    w13 = self.gate_up_proj + self.gate_up_delta  # [E, H, 2I]
    w2 = self.down_proj + self.down_delta  # [E, I, H]
    experts, hidden, _ = w13.shape
    weights = torch.zeros_like(top_k_weights[:, :1]).repeat(1, experts).scatter(1, top_k_index, top_k_weights)
    gate_up = x @ w13.transpose(0, 1).reshape(hidden, -1)
    gate_up = gate_up.unflatten(1, (experts, -1)) + self.gate_up_proj_bias
    inner = self._apply_gate(gate_up) * weights[:, :, None]  # [M, E, I]
    return inner.flatten(1) @ w2.flatten(0, 1) + weights @ self.down_proj_bias


def sink_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    s_aux: Tensor,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention with a sink through PyTorch's fused kernels, which know none.

    A sink adds exp(s) to the softmax's denominator: it is a key before all others with logit s and value 0.
    One more component, 1 in each query and s / scaling in that key alone, makes that logit; eight are added
    for alignment.
    """
    heads, width = query.shape[1], query.shape[3]
    repeat = module.num_key_value_groups
    key, value = (t.repeat_interleave(repeat, dim=1) for t in (key, value))
    query, key, value = (F.pad(t.to(value.dtype), (0, 8, SLOTS, 0)) for t in (query, key, value))
    logits = torch.cat([s_aux.new_full((heads, SLOTS - 1), VOID), s_aux[:, None]], dim=1) / scaling
    extra = F.pad(logits.to(key.dtype), (0, key.shape[2] - SLOTS))[None, :, :, None]
    column = torch.arange(width + 8, device=key.device) == width
    key = torch.where(column, extra, key)
    query = torch.where(column, torch.ones_like(query), query)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=scaling
    )
    return out[:, :, SLOTS:, :width].transpose(1, 2).contiguous(), None


def attention_masks(length: int, window: int, device: torch.device) -> dict[str, Tensor | None]:
    """What `sink_attention` needs for each kind of layer; no mask means causal."""
    q = torch.arange(length + SLOTS, device=device)[:, None]
    k = q.T
    return {"full_attention": None, "sliding_attention": (k <= q) & ((k < SLOTS) | (q - k < window))}


ALL_EXPERTS_FUNCTIONS.register("train_dense", dense_experts)
AttentionInterface.register("train_sink", sink_attention)


def build(dropout: float) -> GptOssForCausalLM:
    """A freshly initialised model that trains through `dense_experts` and `sink_attention`."""
    model = GptOssForCausalLM._from_config(
        config(), attn_implementation="train_sink", experts_implementation="train_dense"
    )
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.register_buffer("gate_up_delta", torch.zeros_like(experts.gate_up_proj), persistent=False)
        experts.register_buffer("down_delta", torch.zeros_like(experts.down_proj), persistent=False)
        layer.self_attn.o_proj.register_forward_hook(lambda m, _, y: F.dropout(y, dropout, m.training))
        layer.mlp.register_forward_hook(lambda m, _, y: (F.dropout(y[0], dropout, m.training), *y[1:]))
    model.model.embed_tokens.register_forward_hook(lambda m, _, y: F.dropout(y, dropout, m.training))
    return model


def mxfp4(w: Tensor) -> Tensor:
    """`w` [E, K, N] as MXFP4 stores it: blocks of 32 run along K, the rule is the one `export.py` uses."""
    q = quantize(w.transpose(1, 2).contiguous(), "mxfp4", rule="even")
    return dequantize(q, torch.float32).transpose(1, 2).to(w.dtype)


@torch.no_grad()
def requantise(model: GptOssForCausalLM) -> None:
    """Make the experts compute with MXFP4 weights; gradients pass straight through to the master weights.

    The rounding error lives in buffers that are added inside the graph: switching it on does not recompile.
    """
    experts = [layer.mlp.experts for layer in model.model.layers]
    for weight, delta in (("gate_up_proj", "gate_up_delta"), ("down_proj", "down_delta")):
        masters = torch.cat([getattr(e, weight) for e in experts])
        for e, d in zip(experts, (mxfp4(masters) - masters).split(experts[0].num_experts), strict=True):
            getattr(e, delta).copy_(d)


def loss(model: GptOssForCausalLM, ids: Tensor, masks: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy in nats, and how unevenly the experts are used (1: evenly).

    ids: [B, T + 1].
    """
    out = model.model(input_ids=ids[:, :-1], attention_mask=masks, use_cache=False, output_router_logits=True)
    logits = model.lm_head(out.last_hidden_state)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    uneven = nats.new_zeros(())
    for router_logits in out.router_logits:  # [M, E]
        probs = router_logits.float().softmax(-1)
        chosen = probs.topk(model.num_experts_per_tok, dim=-1).indices
        share = torch.zeros_like(probs).scatter(1, chosen, 1 / chosen.shape[1]).mean(0)
        uneven = uneven + model.num_experts * (share * probs.mean(0)).sum() / len(out.router_logits)
    return nats, uneven
