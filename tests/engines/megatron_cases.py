"""Three steps of farspan's models in megatron-core on N ranks, whatever the layout."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from data_pipeline.stream import Batch
from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.engines.megatron.checkpoint import load_model, save_model
from pretrain.engines.megatron.cpu import on_any_device
from pretrain.engines.megatron.engine import MegatronEngine
from pretrain.errors import UserError
from pretrain.layouts import resolve_layout
from pretrain.schedule import learning_rate
from tests.oracle.cases import STEPS, run_cases

CHECKPOINT = Path(sys.argv[2]) / "checkpoint"


def read_batches(engine: MegatronEngine) -> list[Batch]:
    """This data rank's rows of the first global batches."""
    stream, size = open_stream(engine.config), engine.config.train.global_batch
    share = size // engine.data_ranks
    mine = range(engine.data_rank * share, (engine.data_rank + 1) * share)
    return [stream.read(stream.next_batch(size), mine) for _ in range(STEPS)]


def run_steps(engine: MegatronEngine, batches: list[Batch], first: int = 0) -> dict[str, Any]:
    train, losses, gradients = engine.config.train, [], {}
    for step, batch in enumerate(batches[first:], first):
        lr = learning_rate(step, train.steps, engine.config.optim.lr, engine.config.schedule)
        if step > 0:
            losses.append(engine.step(batch, lr).loss)
            continue
        loss, _ = engine.backward(batch)
        losses.append(loss)
        gradients = engine.weights(lambda weight: weight.main_grad)
        engine.update(lr)
    return {"losses": losses, "gradients": gradients, "weights": engine.weights()}


@on_any_device()
def reload(engine: MegatronEngine) -> dict[str, Any]:
    """From a checkpoint as a user of megatron-core saves it, after what is none of the model."""
    refused = []
    for folder in (CHECKPOINT.parent, CHECKPOINT):
        try:
            load_model(engine, folder)
        except UserError as error:
            refused.append(str(error))
    own = CHECKPOINT.with_name("own")
    own.mkdir(exist_ok=True)
    dist_checkpointing.save({"model": engine.models[0].sharded_state_dict()}, str(own))
    engine.load_weights({name: -weight for name, weight in engine.weights().items()})
    load_model(engine, own)
    return {"refused": refused, "reloaded": engine.weights()}


def run_case(name: str, config: Config, device: torch.device) -> dict[str, Any]:
    engine = MegatronEngine(config, resolve_layout(config, dist.get_world_size()), device)
    batches, first_weights = read_batches(engine), engine.weights()
    if name.endswith("resumed"):
        run_steps(engine, batches[:1])
        state = copy.deepcopy(engine.state_dict())
        run_steps(engine, batches[:1])
        engine.load_state_dict(state)
        result = run_steps(engine, batches, first=1)
        save_model(engine, CHECKPOINT)
    elif name.endswith("loaded"):
        load_model(engine, CHECKPOINT)
        result = {"weights": engine.weights()}
        engine.load_weights({weight: -value for weight, value in first_weights.items()})
        result["negated"] = engine.weights()
    else:
        result = run_steps(engine, batches)
    if name.endswith("softmax"):
        result |= reload(engine)
    engine.close()
    return {"first_weights": first_weights, **result}


if __name__ == "__main__":
    run_cases(run_case)
