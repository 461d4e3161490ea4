"""`farspan replay`: train one step of a run again and compare it with the ledger."""

import json
from pathlib import Path
from typing import Any

import typer

from launch.shared import run_shared
from pretrain.errors import UserError
from pretrain.ledger import Skipped, Trained, read_ledger
from pretrain.run_dir import RunDirectory


def print_replay(directory: Path, step: int, which: int | None) -> None:
    """Print what a step measures when it is trained again, and whether the ledger has the same.

    Args:
        which: of the times that a batch was tried as that step, from 1; None: the last.
    """
    from pretrain.replay import tries

    run = RunDirectory(directory)
    if not run.ledger.is_file():
        raise UserError(f"{run.root} has no {run.ledger.name}; a run that was trained has one")
    tried = tries(list(read_ledger(run.ledger)), step)
    if not tried:
        raise UserError(f"no batch was tried as step {step} in {run.root}")
    if which is not None and not 1 <= which <= len(tried):
        raise UserError(f"--try {which}: step {step} was tried {len(tried)} times")
    number = which or len(tried)
    for i, record in enumerate(tried, start=1):
        print(f"{'*' if i == number else ' '} try {i}: {_describe(record)}")
    record = tried[number - 1]
    ranks = run.ranks_of(record.attempt)
    if not ranks.is_file():
        raise UserError(f"{ranks} is missing, which says how many ranks the attempt had")
    nproc = json.loads(ranks.read_text())["ranks"]
    arguments = (str(run.root), str(record.attempt), str(record.first_token))
    replayed = run_shared("pretrain.replay", arguments, nproc)
    _print(record, replayed)
    if replayed["differs"]:
        raise typer.Exit(1)


def _describe(record: Trained | Skipped) -> str:
    became = f"skipped: {record.reason}" if isinstance(record, Skipped) else "trained"
    return (
        f"attempt {record.attempt}, tokens {record.first_token:,} to {record.stop_token:,}, loss "
        f"{record.loss!r}, gradient norm {record.grad_norm!r}, {became}"
    )


def _print(record: Trained | Skipped, replayed: dict[str, Any]) -> None:
    print(f"replayed from step {replayed['checkpoint']} by the ranks of attempt {record.attempt}")
    print(f"loss {replayed['loss']!r}, gradient norm {replayed['grad_norm']!r}")
    for rank, what in replayed["not_finite"].items():
        print(f"rank {rank}: {what}")
    if replayed["differs"]:
        print("not bitwise as in the ledger:")
        for difference in replayed["differs"]:
            print(f"  {difference}")
    else:
        print("bitwise as in the ledger")
