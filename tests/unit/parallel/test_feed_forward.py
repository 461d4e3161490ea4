"""Feed-forwards by tiles of tokens give the gradients of all tokens at once, in less memory."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from parallel.feed_forward import tile_feed_forwards
from parallel.recompute import Recompute, recompute_layers
from pretrain.dry_run.tracker import StepTracker
from pretrain.model.config import AttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig
from pretrain.model.init import initialize
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import Transformer
from tests.unit.parallel.test_recompute import Operations

EXPERTS = MoEConfig(n_experts=4, top_k=2, d_expert=256, d_shared_expert=256)
CONFIG = ModelConfig(
    vocab_size=50,
    d_model=64,
    n_layers=2,
    layer_pattern=("linear", "softmax"),
    d_ff=512,
    attention=AttentionConfig(4, 2, 16),
    linear=LinearAttentionConfig(2, 4, 16, 16),
    moe=EXPERTS,
    init_std=0.1,
)
MODELS = {
    "experts": CONFIG,
    "balance of a row": replace(CONFIG, moe=replace(EXPERTS, balance="sequence")),
    "capacity": replace(CONFIG, moe=replace(EXPERTS, capacity_factor=1.0)),
    "dense": replace(CONFIG, moe=MoEConfig(n_experts=0)),
}
ROWS, LENGTH = 2, 250
MIXTURE = torch.ops.farspan.looped_mixture.default


class Trained(NamedTuple):
    """A step's gradients, the most bytes alive in it, and the operations of its backward."""

    gradients: dict[str, Tensor]
    peak: int
    backward: Counter[Any]


def train(config: ModelConfig, tile: int | None, modes: Sequence[Recompute] = ("none",)) -> Trained:
    model = Transformer(config).double()
    initialize(model, config, seed=0)
    if tile is not None:
        tile_feed_forwards(model.layers.values(), tile)
    recompute_layers(dict(model.layers.items()), modes)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (ROWS, LENGTH), generator=generator)
    towards = torch.randn(ROWS, LENGTH, config.d_model, generator=generator, dtype=torch.float64)
    documents = Documents.from_lengths([[30, 220], [250]])
    with StepTracker({}) as tracker, Operations() as backward:
        out = model(tokens, documents, lambda hidden, _: hidden)
        backward.calls.clear()
        ((out.value * towards).sum() + out.balance.sum() + out.z.sum()).backward()
    gradients = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    return Trained(gradients, tracker.peak, backward.calls)


@pytest.mark.parametrize("modes", [["none"], ["selective"], ["full", "none"]])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_all_tokens_at_once(kind: str, modes: list[Recompute]) -> None:
    # Neither rows nor all tokens are whole tiles.
    ours, whole = (train(MODELS[kind], tile, modes).gradients for tile in (64, None))
    assert ours.keys() == whole.keys()
    for name, expected in whole.items():
        assert (ours[name] - expected).norm() <= 1e-12 * expected.norm(), name


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_hidden_activations_exist_for_one_tile_at_a_time(kind: str) -> None:
    config = MODELS[kind]
    full = ("full",)
    tiled, whole = (train(config, tile, full).peak for tile in (50, None))
    width = config.d_ff if kind == "dense" else 2 * EXPERTS.d_expert
    # Of a SwiGLU: gate and up, at least, for all tokens but those of a tile.
    assert whole - tiled >= 2 * width * (ROWS * LENGTH - 50) * 8


def test_a_layer_that_recomputes_runs_its_feed_forward_once_more_and_not_twice() -> None:
    n_tiles = ROWS * LENGTH // 50
    for mode in ("none", "selective", "full"):
        assert train(CONFIG, 50, (mode,)).backward[MIXTURE] == CONFIG.n_layers * n_tiles, mode
