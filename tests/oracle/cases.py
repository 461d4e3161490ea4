"""What the scripts on N ranks share: their command line, and the batches they read."""

import re
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.stream import TokenStream
from parallel.mesh import join_ranks
from pretrain.config import Config, TrainConfig, load_config

STEPS = 3


class Microbatch(NamedTuple):
    """Each [B, T] int64."""

    tokens: Tensor
    labels: Tensor
    position: Tensor


def arguments(shards: Path, results: Path, cases: Mapping[str, str]) -> list[str]:
    """The arguments of a script for `cases`, each a name and `key=value,key=value`."""
    return [str(shards), str(results), *(f"{name}:{text}" for name, text in cases.items())]


def run_cases(run_case: Callable[[str, Config, torch.device], dict[str, Any]]) -> None:
    """Run the cases of the command line; what each returns on rank 0 is saved as `NAME.pt`."""
    shards, results = Path(sys.argv[1]), Path(sys.argv[2])
    device = join_ranks(timedelta(minutes=10))
    for case in sys.argv[3:]:
        name, _, overrides = case.partition(":")
        config = load_config(
            "tiny-hybrid-moe", [f"data.shards={shards}", *split_overrides(overrides)]
        )
        result = run_case(name, config, device)
        if dist.get_rank() == 0:
            torch.save(result, results / f"{name}.pt")
    # gloo may abort a rank that leaves while another still works.
    dist.barrier()
    dist.destroy_process_group()


def split_overrides(overrides: str) -> list[str]:
    """A value may be a list, whose commas separate no overrides."""
    return re.split(r",(?=[\w.]+=)", overrides)


def read_microbatches(
    stream: TokenStream, train: TrainConfig, rank: int, ranks: int
) -> list[Microbatch]:
    """The part of data rank `rank` of the next global batch."""
    plan = stream.next_batch(train.global_batch)
    share = train.global_batch // ranks
    starts = range(share * rank, share * (rank + 1), train.microbatch)
    batches = [stream.read(plan, range(start, start + train.microbatch)) for start in starts]
    return [
        Microbatch(*map(torch.from_numpy, (batch.tokens, batch.labels, batch.position)))
        for batch in batches
    ]
