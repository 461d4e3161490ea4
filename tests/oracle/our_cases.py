"""Three steps of farspan's trainer on N ranks, whatever the layout."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain.config import Config
from pretrain.engines.native import NativeEngine
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer
from tests.oracle.cases import STEPS, run_cases


def whole(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that are sharded, or on one stage of a pipeline only, on every rank. Collective."""
    mine = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors
    }
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return {name: tensor for tensors in of_ranks for name, tensor in tensors.items()}


def run_case(_: str, config: Config, device: torch.device) -> dict[str, Any]:
    trainer = Trainer(config, RunDirectory(Path("nowhere")), device)
    engine = trainer.engine
    assert isinstance(engine, NativeEngine)
    losses, gradients = [], {}
    for step in range(STEPS):
        measured = trainer.backward(trainer.read_batch())[0]
        losses.append(measured.loss)
        if step == 0:
            gradients = whole(
                (name, w.grad)
                for name, w in engine.weights.named_parameters()
                if w.grad is not None
            )
        trainer.finish_step(measured)
    weights = whole(engine.weights.named_parameters())
    return {"losses": losses, "gradients": gradients, "weights": weights}


if __name__ == "__main__":
    run_cases(run_case)
