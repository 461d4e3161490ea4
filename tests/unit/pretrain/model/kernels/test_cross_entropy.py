"""Cross-entropy in chunks, of a whole and a sharded vocabulary."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.dry_run.tracker import StepTracker
from pretrain.model.kernels.cross_entropy import (
    IGNORED,
    VocabularyShard,
    chunked_cross_entropy,
)


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

    torch.testing.assert_close(loss, whole)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_more_logits_exist_than_those_of_a_chunk() -> None:
    tokens, vocabulary, chunk = 256, 500, 16
    hidden = torch.randn(1, tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens))

    def peak(chunk: int) -> int:
        with StepTracker({}) as tracker:
            chunked_cross_entropy(hidden, weight, labels, chunk).backward()
        return tracker.peak

    logits = 4 * vocabulary
    assert peak(tokens) > tokens * logits
    assert peak(chunk) < 4 * chunk * logits + 4 * weight.nbytes + 4 * hidden.nbytes


def test_shards_of_the_vocabulary_give_the_loss_and_the_parts_of_the_gradient() -> None:
    torch.manual_seed(0)
    hidden = 9 * torch.randn(2, 9, 8, dtype=torch.float64)
    weight = torch.randn(12, 8, dtype=torch.float64)
    labels = torch.randint(0, 12, (2, 9))
    labels[0, 3] = labels[1, 8] = IGNORED
    barrier, places = Barrier(3), [torch.empty(0)] * 3

    def on_rank(rank: int) -> tuple[Tensor, ...]:
        def gather(x: Tensor) -> Tensor:
            places[rank] = x
            barrier.wait()
            stacked = torch.stack(places)
            barrier.wait()
            return stacked

        h, w = (x.clone().requires_grad_() for x in (hidden, weight.chunk(3)[rank]))
        loss = chunked_cross_entropy(h, w, labels, 5, VocabularyShard(4 * rank, gather))
        return loss.detach(), *torch.autograd.grad(3 * loss, (h, w))

    with ThreadPoolExecutor(3) as ranks:
        losses, d_hidden, d_weight = zip(*ranks.map(on_rank, range(3)), strict=True)

    inputs = hidden.requires_grad_(), weight.requires_grad_()
    whole = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    expected = torch.autograd.grad(3 * whole, inputs)
    for loss in losses:
        torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(sum(d_hidden), expected[0])
    torch.testing.assert_close(torch.cat(d_weight), expected[1])


def test_a_label_outside_the_vocabulary_makes_the_loss_infinite() -> None:
    loss = chunked_cross_entropy(torch.randn(2, 4), torch.randn(3, 4), torch.tensor([1, 3]), 2)
    assert loss.isinf()


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
