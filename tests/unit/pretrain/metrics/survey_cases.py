"""What a survey says of real steps, beside what has changed; run on 2 ranks by test_survey.py.

Arguments: the shards, the folder for results, the cases as `name:key=value key=value`.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.mesh import join_ranks, release_groups
from pretrain.config import load_config
from pretrain.metrics.step import metrics_row
from pretrain.metrics.survey import survey
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
        for name, weight in trainer.weights.named_parameters()
    }


def norm(tensors: list[Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in tensors) ** 0.5


def run_case(shards: str, overrides: list[str], device: torch.device) -> dict[str, Any]:
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


def main() -> None:
    shards, results = sys.argv[1], Path(sys.argv[2])
    device = join_ranks(timedelta(minutes=2))
    for case in sys.argv[3:]:
        name, _, overrides = case.partition(":")
        result = run_case(shards, overrides.split(), device)
        (results / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
