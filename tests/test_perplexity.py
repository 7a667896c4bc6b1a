"""Perplexity against a loop that does one token at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import microscale.perplexity as module
from microscale.errors import MicroscaleError
from microscale.perplexity import Perplexity, perplexity

VOCAB = 50


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCAB, max_position_embeddings=64)).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return made


class Bigram(nn.Module):
    """Logits by the last token alone, in any dtype: what is wanted can be worked out from the table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.device = table, table.device
        self.sizes: list[tuple[int, ...]] = []
        self.config = SimpleNamespace(vocab_size=len(table))
        self.config.get_text_config = lambda: self.config

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        self.sizes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids])


def by_hand(model: Any, tokens: list[int], window: int) -> list[float]:
    """-ln p of each token but the first, from the tokens since its window's start."""
    found = []
    for i in range(1, len(tokens)):
        start = (i - 1) // window * window
        with torch.no_grad():
            last = model(input_ids=torch.tensor([tokens[start:i]])).logits[0, -1].double()
        found.append(float(torch.logsumexp(last, 0) - last[tokens[i]]))
    return found


@pytest.mark.parametrize("length, window", [(41, 8), (45, 8), (9, 8), (8, 8), (2, 8), (30, 1), (20, 64)])
@pytest.mark.parametrize("batch_bytes", [1, 1 << 14, 1 << 28])
def test_equals_a_loop_over_tokens(
    model: Any, length: int, window: int, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", batch_bytes)
    tokens = torch.randint(0, VOCAB, (length,))
    found = perplexity(model, tokens, window)
    wanted = by_hand(model, tokens.tolist(), window)
    assert found.tokens == length - 1
    torch.testing.assert_close(found.token_nll.double(), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-5)
    mean = sum(wanted) / len(wanted)
    assert found.nll == pytest.approx(mean, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)


def test_batches_are_as_large_as_memory_allows() -> None:
    model = Bigram(torch.randn(64, 64))
    window = 16
    size = module.BATCH_BYTES // (4 * window * 64)
    perplexity(model, torch.zeros(window * (size + 3) + 5, dtype=torch.long), window)
    assert model.sizes == [(size, window), (3, window), (1, 4)]
    model.config.num_attention_heads = 1 << 30
    model.sizes.clear()
    perplexity(model, torch.zeros(2 * window + 1, dtype=torch.long), window)
    assert model.sizes == [(1, window), (1, window)]


def test_log_softmax_is_float32_whatever_the_model_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_BYTES", 4 * 300 * 7)  # seven rows at a time, ragged at the end
    table = (torch.randn(300, 300) * 4).bfloat16()
    tokens = torch.randint(0, 300, (97,))
    exact = torch.log_softmax(table.double(), dim=-1)
    wanted = -exact[tokens[:-1], tokens[1:]]
    found = perplexity(Bigram(table), tokens, 16).token_nll
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-5)


def test_bits_per_byte(model: Any) -> None:
    tokens = torch.randint(0, VOCAB, (33,))
    found = perplexity(model, tokens, 8, text_bytes=100)
    assert found.bits_per_byte == pytest.approx(float(found.token_nll.double().sum()) / math.log(2) / 100)
    assert perplexity(model, tokens, 8).bits_per_byte is None


def test_progress_wraps_the_batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 1)
    seen = []
    perplexity(
        model, torch.randint(0, VOCAB, (30,)), 8, lambda batches: [seen.append(1) or b for b in batches]
    )
    assert len(seen) == 4


def test_the_standard_error_is_that_of_means_of_windows() -> None:
    """Tokens of a window that go up and down together: errors by tokens would be far too small."""
    means = torch.randn(40).double()
    found = Perplexity(means.repeat_interleave(25).float(), 25)
    assert found.stderr == pytest.approx(found.perplexity * float(means.std()) / math.sqrt(40), rel=1e-5)
    assert math.isnan(Perplexity(torch.ones(25), 25).stderr)


def test_a_change_is_paired() -> None:
    hard = torch.rand(8).repeat_interleave(16) * 5  # windows differ far more than models do
    base = Perplexity(hard, 16)
    shifted = Perplexity(hard + 0.01 + 1e-4 * torch.randn(128), 16)
    change, stderr = shifted.change(base)
    assert change == pytest.approx(math.expm1(0.01), rel=0.05)
    assert stderr < 1e-4 < base.stderr / base.perplexity
    assert change == pytest.approx(shifted.perplexity / base.perplexity - 1, rel=1e-3)
    assert base.change(base) == (0.0, 0.0)
    for other in (Perplexity(hard[1:], 16), Perplexity(hard, 8)):
        with pytest.raises(MicroscaleError, match="not the same text"):
            base.change(other)


def test_what_makes_no_sense_is_refused(model: Any) -> None:
    for bad in (torch.zeros(1, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)):
        with pytest.raises(MicroscaleError, match="tokens: expected at least 2"):
            perplexity(model, bad)
    with pytest.raises(MicroscaleError, match="window: expected at least 1, found 0"):
        perplexity(model, torch.zeros(9, dtype=torch.long), 0)


def test_an_infinite_loss_is_an_infinite_perplexity() -> None:
    found = Perplexity(torch.full((32,), 1e4), 16)
    assert found.perplexity == math.inf
    assert Perplexity(torch.full((32,), math.nan), 16).nll != found.nll
