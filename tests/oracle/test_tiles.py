"""Our tiles of feed-forwards and of the loss against DeepSpeed's, in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.feed_forward import tile_feed_forwards
from pretrain.model.kernels.cross_entropy import IGNORED, chunked_cross_entropy
from pretrain.model.mlp import SwiGLU
from tests.oracle.compare import assert_same

pytestmark = pytest.mark.oracle

TOLERANCE = 1e-12
BATCH, TOKENS, WIDTH, VOCABULARY = 2, 24, 16, 40


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradients(out: Tensor, d_out: Tensor, x: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """What comes of one pass forward and backward."""
    out.backward(d_out)
    of_weights = {name: weight.grad for name, weight in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **of_weights}


@pytest.mark.parametrize("tiles", [1, 4])
def test_feed_forward_is_that_of_tiled_mlp(tiles: int) -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    ours = SwiGLU(WIDTH, 3 * WIDTH).double()
    theirs = copy.deepcopy(ours)
    x, d_out = draw(BATCH, TOKENS, WIDTH), draw(BATCH, TOKENS, WIDTH).cos()
    tile_feed_forwards([SimpleNamespace(mlp=ours, moe=None)], BATCH * TOKENS // tiles)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = TiledMLP.apply(SwiGLU.forward, theirs, its, tiles, list(theirs.parameters()))
    found = gradients(ours(mine), d_out, mine, ours)
    assert_same(found, gradients(out, d_out, its, theirs), TOLERANCE)


@pytest.mark.parametrize("tiles", [1, 4])
def test_loss_is_that_of_tiled_fused_logits_loss(tiles: int) -> None:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def summed(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden).flatten(0, -2)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")

    ours = nn.Linear(WIDTH, VOCABULARY, bias=False).double()
    theirs = copy.deepcopy(ours)
    x, labels = draw(BATCH, TOKENS, WIDTH), torch.arange(BATCH * TOKENS).view(BATCH, -1)
    labels = labels.remainder(VOCABULARY).masked_fill(labels % 5 == 0, IGNORED)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = list(theirs.parameters())
    out = TiledFusedLogitsLoss.apply(summed, theirs, its, labels, None, tiles, weights, "sum")
    loss = chunked_cross_entropy(mine, ours.weight, labels, BATCH * TOKENS // tiles)
    # Its backward pass lies in its forward pass, and heeds no other gradient than 1.
    one = torch.ones((), dtype=torch.float64)
    found = gradients(loss, one, mine, ours)
    assert_same(found, gradients(out, one, its, theirs), TOLERANCE)
