"""Count what real steps compute; run on 2 ranks by test_flops.py.

Arguments: the shards, the folder for results, the cases as `name:key=value key=value`.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from parallel.mesh import release_groups
from pretrain.config import load_config
from pretrain.dry_run.assumptions import gpu_kernels
from pretrain.metrics.utilization import extent_of_batch, step_flops
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer
from tests.rank_cases import run_cases
from tests.unit.pretrain.metrics.flop_counter import counted


def run_case(shards: Path, overrides: list[str], device: torch.device) -> dict[str, Any]:
    is_grouped = "grouped" in overrides
    overrides = [x for x in overrides if "=" in x]
    config = load_config("tiny-hybrid-moe", [f"data.shards={shards}", *overrides])
    trainer = Trainer(config, RunDirectory(Path("nowhere")), device)
    batch = trainer.read_batch()
    measured: list[Any] = []
    with gpu_kernels() if is_grouped else nullcontext():
        computed = counted(lambda: measured.append(trainer.backward(batch)[0]))
    dropped = float(measured[0].dropped.sum())
    predicted = step_flops(config, extent_of_batch(config, trainer.plan), dropped)
    release_groups()
    return {
        "counted": computed,
        "predicted": predicted._asdict(),
        "documents": int((batch.position == 0).sum()),
        "dropped": dropped,
    }


if __name__ == "__main__":
    run_cases(run_case)
