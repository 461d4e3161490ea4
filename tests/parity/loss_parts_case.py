"""The loss by source and by position, and of the same rows with other labels hidden.

Run on ranks by test_loss_parts.py; arguments: the folder for results, the cases as JSON: overrides
by name.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from parallel.mesh import join_ranks, release_groups
from pretrain.config import load_config
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.run_dir import RunDirectory
from pretrain.token_losses import LossPart
from pretrain.trainer import Trainer

# Of those of two sources, and those predicted from 16 to 31 others.
SOURCE, BUCKET = 1, 4


def run_case(overrides: list[str], device: torch.device) -> dict[str, Any]:
    config = load_config("tiny-hybrid-moe", overrides)
    trainer = Trainer(config, RunDirectory(Path("nowhere")), device)
    has_lanes = config.context.lane_rows > 1
    for _ in range(1 + has_lanes):
        batch = trainer.read_batch()
        measured, _ = trainer.backward(batch)
    found = {
        "loss": measured.loss,
        "loss_tokens": measured.loss_tokens,
        "by_source": as_lists(measured.by_source),
        "by_position": as_lists(measured.by_position),
        "pipeline_bubble": measured.pipeline_bubble,
        "exposed_communication_s": measured.exposed_communication_s,
    }
    if not has_lanes:
        seen = batch.position + 1
        of_bucket = (seen >= 2**BUCKET) & (seen < 2 ** (BUCKET + 1))
        for name, is_shown in (("of_source", batch.source == SOURCE), ("of_bucket", of_bucket)):
            labels = np.where(is_shown, batch.labels, IGNORED)
            shown, _ = trainer.backward(replace(batch, labels=labels))
            found[name] = [shown.loss, shown.loss_tokens]
    release_groups()
    return found


def as_lists(parts: Sequence[LossPart]) -> list[list[float]]:
    return [[part.loss, part.tokens] for part in parts]


if __name__ == "__main__":
    device = join_ranks(timedelta(minutes=2))
    for name, overrides in json.loads(sys.argv[2]).items():
        found = run_case(overrides, device)
        result = Path(sys.argv[1]) / f"{name}-{dist.get_rank()}.json"
        result.write_text(json.dumps(found))
    dist.destroy_process_group()
