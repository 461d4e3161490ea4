"""Three steps of farspan's models in megatron-core on N ranks, whatever the layout."""

from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.engines.megatron.engine import MegatronEngine
from pretrain.layouts import resolve_layout
from pretrain.schedule import learning_rate
from tests.oracle.cases import STEPS, run_cases


def run_case(_: str, config: Config, device: torch.device) -> dict[str, Any]:
    engine = MegatronEngine(config, resolve_layout(config, dist.get_world_size()), device)
    stream, train = open_stream(config), config.train
    share = train.global_batch // engine.data_ranks
    mine = range(engine.data_rank * share, (engine.data_rank + 1) * share)
    losses, gradients = [], {}
    for step in range(STEPS):
        batch = stream.read(stream.next_batch(train.global_batch), mine)
        loss, _ = engine.backward(batch)
        losses.append(loss)
        if step == 0:
            gradients = engine.weights(lambda weight: weight.main_grad)
        engine.update(learning_rate(step, train.steps, config.optim.lr, config.schedule))
    weights = engine.weights()
    engine.close()
    return {"losses": losses, "gradients": gradients, "weights": weights}


if __name__ == "__main__":
    run_cases(run_case)
