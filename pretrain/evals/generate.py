"""Continue a prompt, token by token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.errors import TrainingError, UserError
from pretrain.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_id: int | None = None,
) -> list[int]:
    """Up to `max_new_tokens` token ids that follow the prompt.

    Every token runs the model over the whole prefix again: meant for looking at a model, not for
    serving it, which is what the exported checkpoint is for.

    Args:
        temperature: divides the logits before sampling; 0 always takes the likeliest token.
        top_k: sample among the k likeliest tokens only; None is all of them.
        seed: of the sampling, which draws from a generator of its own.
        stop_id: generation ends before this token, which is not returned.

    Raises:
        UserError: an empty prompt, a negative temperature, top_k < 1, or a seed of over 64 bits.
        TrainingError: the logits are not finite.
    """
    if not prompt_ids:
        raise UserError("the prompt has no tokens: give at least one")
    if temperature < 0:
        raise UserError(f"temperature = {temperature}: must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k = {top_k}: must be at least 1")
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"seed = {seed}: must be at least -2^63 and below 2^64")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids], device=device), output=_last_logits).value
        token = _pick(logits.cpu(), temperature, top_k, generator)
        if token == stop_id:
            break
        ids.append(token)
    return ids[len(prompt_ids) :]


def _last_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[1, T, d], [V, d] -> the logits [V] after the last token, in float32."""
    return F.linear(hidden[0, -1], weight).float()


def _pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if not logits.isfinite().all():
        raise TrainingError(
            "the model's logits are not finite, so that no token is likelier than another; "
            "`farspan report RUN` shows since which step its weights or losses are not"
        )
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None:
        lowest = logits.topk(min(top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    # However low the temperature, the likeliest stays finite.
    scaled = (logits - logits.max()).double() / temperature
    probabilities = torch.softmax(scaled.float(), -1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
