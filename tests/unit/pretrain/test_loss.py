"""Cross-entropy in chunks."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.loss import IGNORED, chunked_cross_entropy


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (2, 9))
    labels[0, 3] = labels[1, 8] = IGNORED

    whole = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    expected = torch.autograd.grad(3 * whole, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, labels, chunk)
    gradients = torch.autograd.grad(3 * loss, (hidden, weight))

    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_loss_of_bf16_weights_is_summed_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, 16).bfloat16(), torch.randn(64, 16).bfloat16()
    labels = torch.randint(0, 64, (4096,))
    loss = chunked_cross_entropy(hidden, weight, labels, 256)
    reference = F.cross_entropy((hidden @ weight.T).double(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)


def test_a_batch_without_loss_tokens_has_no_loss_and_no_gradient() -> None:
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.randn(11, 8), torch.full((1, 4), IGNORED), 2)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.abs().sum() == 0
