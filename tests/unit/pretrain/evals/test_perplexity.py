from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrain.errors import UserError
from pretrain.evals.perplexity import perplexity


class MeanOfPrefix(nn.Module):
    """A language model whose hidden state is the mean embedding of the tokens it has seen."""

    def __init__(self, vocab_size: int, d: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.embedding = nn.Parameter(torch.randn(vocab_size, d, generator=generator))
        self.lm_head = nn.Parameter(torch.randn(vocab_size, d, generator=generator))

    def forward(self, tokens, documents=None, output=None):
        seen = torch.arange(1, tokens.shape[1] + 1).unsqueeze(-1)
        return SimpleNamespace(
            value=output(self.embedding[tokens].cumsum(1) / seen, self.lm_head), tokens=tokens
        )


def expected_loss(model: MeanOfPrefix, ids: list[int], context: int) -> float:
    """In float64, one token at a time, from the definition of the windows."""
    embedding, lm_head = model.embedding.detach().double(), model.lm_head.detach().double()
    total = 0.0
    for i in range(1, len(ids)):
        start = (i - 1) // context * context
        logits = lm_head @ embedding[ids[start:i]].mean(0)
        total -= float(logits[ids[i]] - logits.exp().sum().log())
    return total / (len(ids) - 1)


@pytest.mark.parametrize(
    ("length", "context", "batch"),
    [(2, 8, 1), (8, 8, 1), (9, 8, 1), (10, 8, 4), (41, 8, 3), (50, 8, 3), (30, 1, 7), (30, 512, 1)],
)
def test_every_token_but_the_first_is_predicted_once_from_its_window(length, context, batch):
    model = MeanOfPrefix(vocab_size=23, d=5)
    ids = torch.randint(23, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    result = perplexity(model, ids, context, batch=batch)
    assert (result.tokens, result.context) == (length - 1, context)
    assert result.loss == pytest.approx(expected_loss(model, ids, context), rel=1e-6)


def test_vocabulary_too_large_for_all_logits_at_once():
    model = MeanOfPrefix(vocab_size=1 << 20, d=2)
    ids = torch.randint(1 << 20, (40,), generator=torch.Generator().manual_seed(1))
    result = perplexity(model, ids, 64)
    assert result.loss == pytest.approx(expected_loss(model, ids.tolist(), 64), rel=1e-6)


@pytest.mark.parametrize(
    ("ids", "context", "message"),
    [
        ([3], 8, r"the text has 1 token"),
        ([3, 23], 8, r"token id 23 is outside .* vocabulary of 23: use the tokenizer"),
        ([3, -1], 8, r"token id -1 is outside"),
        ([3, 4], 0, r"context and batch must be at least 1"),
    ],
)
def test_text_that_cannot_be_evaluated_is_refused(ids, context, message):
    with pytest.raises(UserError, match=message):
        perplexity(MeanOfPrefix(vocab_size=23, d=5), ids, context)
