"""Train a few steps on each of several layouts; run on N ranks by test_layouts.py.

Arguments: the shards, the folder for results, the layouts as `name:key=value,key=value`.
"""

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.mesh import join_ranks
from pretrain.config import load_config
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer

STEPS = 6


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def optimizer_state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The weights, their gradients' moments and the step counts."""
    for weight, moments in optimizer.state.items():
        yield weight
        yield from moments.values()


def run_case(shards: Path, overrides: list[str], device: torch.device) -> dict[str, Any]:
    config = load_config(
        "tiny-hybrid-moe", [f"data.shards={shards}", f"train.steps={STEPS}", *overrides]
    )
    trainer = Trainer(config, RunDirectory(Path("nowhere")), device)
    losses, aux_losses, grad_norms, gradients = [], [], [], {}
    for step in range(STEPS):
        batch = trainer.read_batch()
        measured = trainer.backward(batch)
        losses.append(measured.loss)
        aux_losses.append(measured.aux_loss)
        if step == 0:
            gradients = {name: whole(w.grad) for name, w in trainer.weights.named_parameters()}
        grad_norms.append(trainer.finish_step(measured.expert_counts))
    traffic = trainer.parallelised.traffic.get("ep")
    return {
        "losses": losses,
        "aux_losses": aux_losses,
        "grad_norms": grad_norms,
        "gradients": gradients,
        "dtypes": {tensor.dtype for tensor in optimizer_state(trainer.optimizer)},
        "expert_calls": traffic.calls["all_to_all"] if traffic else 0,
    }


def main() -> None:
    shards, results = Path(sys.argv[1]), Path(sys.argv[2])
    device = join_ranks(timedelta(minutes=10))
    for case in sys.argv[3:]:
        name, _, overrides = case.partition(":")
        result = run_case(shards, overrides.split(","), device)
        if dist.get_rank() == 0:
            torch.save(result, results / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
