"""Mean cross-entropy of a model on a text, at a given context length."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.comm import Communicator
from parallel.context.documents import SplitDocuments
from parallel.layout import split_row
from pretrain.errors import UserError
from pretrain.model.kernels.cross_entropy import IGNORED, chunked_cross_entropy
from pretrain.model.transformer import Transformer

LOGITS_BYTES = 64 << 20


@dataclass(frozen=True)
class Perplexity:
    """Mean cross-entropy in nats per predicted token.

    Attributes:
        loss: its exponential is the perplexity.
        tokens: how many tokens were predicted.
        context: the most tokens that one was predicted from, if the text is as long.
    """

    loss: float
    tokens: int
    context: int


@torch.no_grad()
def perplexity(
    model: Transformer,
    token_ids: Sequence[int] | Tensor,
    context: int,
    *,
    batch: int = 1,
    cp: Communicator | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """The mean cross-entropy of `token_ids` [n], each token but the first predicted once.

    The text is cut into windows of `context` + 1 tokens that overlap by one, the last one as long
    as what is left. No special tokens are added. The softmax is float32, and so is everything else
    where the model's weights are.

    Args:
        batch: windows per forward pass; the result does not depend on it.
        cp: the ranks that share each window, where `split_sequence` has prepared the model for
            them. All of them call this and get the result.
        progress: called with the tokens predicted so far, and all that will be.

    Raises:
        UserError: fewer than two tokens, or a token id that the model has no embedding for.
    """
    if context < 1 or batch < 1:
        raise UserError(f"context and batch must be at least 1, got {context} and {batch}")
    ids = torch.as_tensor(token_ids, dtype=torch.int64)
    _check_ids(ids, model.config.vocab_size)
    device = next(model.parameters()).device
    total = len(ids) - 1
    predicted, sums = 0, []
    for windows in _windows(ids, context, batch):
        sums.append(_summed_cross_entropy(model, windows, device, cp))
        predicted += windows[:, 1:].numel()
        progress(predicted, total)
    return Perplexity(math.fsum(sums) / total, total, context)


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} token(s): at least 2 are needed to predict one")
    if (outside := ids[(ids < 0) | (ids >= vocab_size)]).numel():
        raise UserError(
            f"token id {int(outside[0])} is outside the model's vocabulary of {vocab_size}: "
            "use the tokenizer that the model was trained with"
        )


def _windows(ids: Tensor, context: int, batch: int) -> Iterator[Tensor]:
    """Batches [b, w] of the windows, in order; b <= batch, and w = context + 1 but at the end."""
    whole = (len(ids) - 1) // context
    if whole:
        yield from ids.unfold(0, context + 1, context).split(batch)
    if len(ids) - 1 > whole * context:
        yield ids[whole * context :].unsqueeze(0)


def _summed_cross_entropy(
    model: Transformer, windows: Tensor, device: torch.device, cp: Communicator | None
) -> float:
    tokens, labels, documents = windows[:, :-1], windows[:, 1:], None
    if cp is not None:
        # What follows a token does not change its prediction, so that a window may be filled up.
        padding = (0, -tokens.shape[1] % cp.size)
        tokens, labels = F.pad(tokens, padding), F.pad(labels, padding, value=IGNORED)
        layout = split_row([tokens.shape[1]], cp.size)
        mine = torch.from_numpy(layout.tokens_of(cp.rank))
        tokens, labels = tokens[:, mine], labels[:, mine]
        documents = SplitDocuments.of_rank([layout] * len(tokens), cp.rank).to(device)
    labels = labels.to(device)

    def summed(hidden: Tensor, weight: Tensor) -> Tensor:
        chunk = max(1, LOGITS_BYTES // (4 * weight.shape[0]))
        return chunked_cross_entropy(hidden, weight, labels, chunk)

    total = model(tokens.to(device), documents, output=summed).value.double()
    return float(total if cp is None else cp.all_reduce(total))
