"""What a survey says of real steps, beside what has changed; run on 2 ranks by test_survey.py.

Arguments: the shards, the folder for results, the cases as `name:key=value key=value`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.mesh import release_groups
from pretrain.config import load_config
from pretrain.metrics.step import metrics_row
from pretrain.metrics.survey import survey
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer
from tests.rank_cases import run_cases


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
        for name, weight in trainer.engine.weights.named_parameters()
    }


def norm(tensors: list[Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in tensors) ** 0.5


def run_case(shards: Path, overrides: list[str], device: torch.device) -> dict[str, Any]:
    config = load_config("tiny-hybrid-moe", [f"data.shards={shards}", *overrides])
    trainer = Trainer(config, RunDirectory(Path("nowhere")), device)
    for _ in range(2):
        before, lr = weights(trainer), trainer.lr()
        result = trainer.step(False)
    after = weights(trainer)
    changed = {name: after[name] - before[name] for name in after}
    row = metrics_row(trainer, result, lr, 0.0) | survey(trainer, lr)
    release_groups()
    return {
        "row": row,
        "weight_norm": norm(list(after.values())),
        "update_norm": norm(list(changed.values())),
        "of_layer_1": norm([change for name, change in changed.items() if "layers.1." in name]),
        "weight_of_layer_1": norm([w for name, w in after.items() if "layers.1." in name]),
    }


if __name__ == "__main__":
    run_cases(run_case)
