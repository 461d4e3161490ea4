from pathlib import Path

import torch

from pretrain.balancing import RouterState
from pretrain.checkpoint.contents import of_optimizer, of_routers, of_weights
from pretrain.checkpoint.store import (
    CheckpointStore,
    Progress,
    Retention,
    check_alone,
    checkpoint_in,
)
from pretrain.checkpoint.target import Target
from pretrain.checkpoint.trained import load_weights
from pretrain.config import OptimConfig
from pretrain.model.config import AttentionConfig, ModelConfig, MoEConfig
from pretrain.model.init import initialize
from pretrain.model.transformer import Transformer
from pretrain.optim import build_optimizer


def test_a_loaded_model_chooses_experts_by_the_selection_bias_it_was_trained_to(
    tmp_path: Path,
) -> None:
    config = ModelConfig(
        vocab_size=50,
        d_model=16,
        n_layers=2,
        layer_pattern=("softmax",),
        attention=AttentionConfig(2, 1, 8),
        moe=MoEConfig(4, 1, 8, 8, balance="bias", bias_rate=2.0),
    )
    trained = Transformer(config)
    initialize(trained, config, seed=0)
    routers = RouterState(2, config.moe)
    routers.update(torch.tensor([[4, 4, 4, 0], [0, 4, 4, 4]]))
    store = CheckpointStore(Target(str(tmp_path)), Retention(1), 1, lambda: None)
    store.go_on_from(0)
    optimizer = build_optimizer(trained, OptimConfig())
    tensors = of_weights(trained) | of_optimizer(trained, optimizer)
    store.start_save(Progress(1, 0, {}), tensors | of_routers(routers.state_dict()))
    store.finish_save()

    loaded = Transformer(config)
    checkpoint = checkpoint_in(store.target, 1)
    load_weights(loaded, checkpoint, check_alone(checkpoint))
    assert torch.equal(loaded.embedding.weight, trained.embedding.weight)
    counts = loaded(torch.randint(50, (2, 9))).expert_counts
    assert counts.tolist() == [[0, 0, 0, 18], [18, 0, 0, 0]]
    bias = RouterState.selection_bias_of(loaded.layers)
    assert torch.equal(bias, routers.selection_bias)
