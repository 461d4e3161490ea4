"""Train step by step, each time on another layout; run on 4 ranks by test_reshard.py.

Arguments: the shards, the run directory, the file for the losses, then a layout for each step as
`key=value,key=value`; the word `keep` keeps trainer and layout of the step before.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from parallel.mesh import join_ranks
from pretrain.config import load_config
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer


def main() -> None:
    shards, run, results, *steps = sys.argv[1:]
    device = join_ranks(timedelta(minutes=15))
    if dist.get_rank() == 0:
        Path(run).mkdir()
        RunDirectory(Path(run)).begin_attempt()
    dist.barrier()
    trainer, series = None, []
    for layout in steps:
        if trainer is None or layout != "keep":
            overrides = [f"data.shards={shards}", f"train.steps={len(steps)}", *layout.split(",")]
            config = load_config("tiny-hybrid-moe", overrides)
            trainer = Trainer(config, RunDirectory(Path(run)), device, attempt=1)
        result = trainer.step(False)
        series.append([result.measured.loss, result.measured.aux_loss, result.norms.whole])
        if "keep" not in steps:
            trainer.save(is_last=True)
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(series))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
