"""Three steps of farspan's models on ZeRO, on N ranks.

A case is named by its stage, and by what else it does: zero2-offload, zero3-resumed.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.stream import Batch
from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.engines.deepspeed.engine import DeepSpeedEngine
from pretrain.engines.zero_limits import ZeroConfig
from pretrain.layouts import resolve_layout
from pretrain.schedule import learning_rate
from tests.oracle.cases import STEPS, run_cases

CHECKPOINTS = Path(sys.argv[2]) / "checkpoints"


def read_batches(engine: DeepSpeedEngine) -> list[Batch]:
    """This data rank's rows of the first global batches."""
    stream, size = open_stream(engine.config), engine.config.train.global_batch
    share = size // engine.data_ranks
    mine = range(engine.data_rank * share, (engine.data_rank + 1) * share)
    return [stream.read(stream.next_batch(size), mine) for _ in range(STEPS)]


def run_steps(engine: DeepSpeedEngine, batches: list[Batch], first: int = 0) -> dict[str, Any]:
    train, losses, norms, gradients = engine.config.train, [], [], {}
    for step, batch in enumerate(batches[first:], first):
        loss, _ = engine.backward(batch)
        losses.append(loss)
        if step == 0:
            gradients = engine.gradients()
        lr = learning_rate(step, train.steps, engine.config.optim.lr, engine.config.schedule)
        norms.append(engine.update(lr))
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "weights": engine.weights(),
        "routers": engine.routers.state_dict(),
    }


def zero_of(name: str) -> ZeroConfig:
    stage, offload = int(name.removeprefix("zero")[0]), "offload" in name
    return ZeroConfig(
        stage,
        offload_optimizer=offload,
        offload_parameters=offload and stage == 3,
        # By default all weights of a small model would stay whole on every rank.
        persistence_threshold=0,
    )


def run_case(name: str, config: Config, device: torch.device) -> dict[str, Any]:
    layout = resolve_layout(config, dist.get_world_size())
    engine = DeepSpeedEngine(config, layout, device, zero_of(name))
    batches, first_weights = read_batches(engine), engine.weights()
    result = run_steps(engine, batches)
    return {"first_weights": first_weights, **result}


if __name__ == "__main__":
    run_cases(run_case)
