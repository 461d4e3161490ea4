"""A rank of `bench.long_context`.

Arguments: the kind of the last layer, tokens of a row, shards, and the folder for what it measured.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from bench.long_context import RANKS, SEGMENT
from parallel.mesh import join_ranks
from pretrain.config import load_config
from pretrain.memory import resident_peak
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer

# A longer step warms up by itself.
LONG = 1 << 17


def run_rank(last_layer: str, tokens: str, shards: str, folder: str) -> None:
    torch.set_num_threads(1)
    device = join_ranks(timedelta(hours=2))
    length = int(tokens)
    overrides = [
        f"model.layer_pattern=[linear, linear, linear, {last_layer}]",
        f"data.shards={shards}",
        f"data.seq_len={length}",
        f"context.segments={length // SEGMENT}",
        f"parallel.cp={RANKS}",
    ]
    config = load_config("million-cpu", overrides)
    trainer = Trainer(config, RunDirectory(Path(folder) / "run"), device)
    for _ in range(1 if length > LONG else 2):
        start, cpu_start = time.perf_counter(), time.process_time()
        result = trainer.step(False)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    measured = {
        "s": seconds,
        "cpu_s": cpu_seconds,
        "gib": resident_peak() / (1 << 30),
        "loss": result.measured.loss,
    }
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(measured))
    # Threads of gloo may still free tensors, and abort a process whose interpreter ends meanwhile.
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
