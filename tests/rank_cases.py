"""Run the cases that a script's arguments name, on each of its ranks."""

import json
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import join_ranks

RunCase = Callable[[Path, list[str], torch.device], Mapping[str, Any]]


def run_cases(run_case: RunCase) -> None:
    """Arguments: the shards, the folder for results, the cases as `name:key=value key=value`.

    What `run_case` returns for a case goes into NAME-RANK.json.
    """
    shards, results = Path(sys.argv[1]), Path(sys.argv[2])
    device = join_ranks(timedelta(minutes=2))
    for case in sys.argv[3:]:
        name, _, overrides = case.partition(":")
        found = run_case(shards, overrides.split(), device)
        (results / f"{name}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
