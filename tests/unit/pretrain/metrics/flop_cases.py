"""Count what real steps compute; run on 2 ranks by test_flops.py.

Arguments: the shards, the folder for results, the cases as `name:key=value key=value`.
"""

import json
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import join_ranks, release_groups
from pretrain.config import load_config
from pretrain.dry_run.assumptions import gpu_kernels
from pretrain.metrics.utilization import extent_of_batch, step_flops
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer
from tests.unit.pretrain.metrics.flop_counter import counted


def run_case(shards: str, overrides: list[str], device: torch.device) -> dict[str, Any]:
    is_grouped = "grouped" in overrides
    overrides = [x for x in overrides if "=" in x]
    config = load_config("tiny-hybrid-moe", [f"data.shards={shards}", *overrides])
    trainer = Trainer(config, RunDirectory(Path("nowhere")), device)
    batch = trainer.read_batch()
    measured: list[Any] = []
    with gpu_kernels() if is_grouped else nullcontext():
        computed = counted(lambda: measured.append(trainer.backward(batch)))
    dropped = float(measured[0].dropped.sum())
    predicted = step_flops(config, extent_of_batch(config, trainer.plan), dropped)
    release_groups()
    return {
        "counted": computed,
        "predicted": predicted._asdict(),
        "documents": int((batch.position == 0).sum()),
        "dropped": dropped,
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
