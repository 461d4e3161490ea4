"""`farspan replay`: train one step of a run again and compare it with the ledger."""

import math
from pathlib import Path
from typing import Any

import typer

from launch.environment import cores_here
from launch.shared import run_shared
from pretrain.config import read_run_config
from pretrain.errors import UserError
from pretrain.ledger import Skipped, Trained
from pretrain.run_dir import RunDirectory

# Ranks on a CPU that are worth their while: tests of a layout share cores, a cluster's run cannot.
RANKS_PER_CORE = 4
DIFFERENCES_AT_MOST = 10


def print_replay(
    directory: Path, step: int, which: int | None, max_steps_again: int | None
) -> None:
    """Print what a step measures when it is trained again, and whether the ledger has the same.

    Args:
        which: of the times that a batch was tried as that step, from 1; None: the last.
        max_steps_again: how many steps may be trained again, itself included; None: the default.

    Raises:
        UserError: there is nothing to replay, or it takes more steps or ranks than it may.
    """
    from pretrain.replay_plan import MAX_STEPS_AGAIN, plan_replay, read_outcomes, tries

    run = RunDirectory(directory)
    if not run.ledger.is_file():
        raise UserError(f"{run.root} has no {run.ledger.name}; a run that was trained has one")
    tried = tries(read_outcomes(run), step)
    if not tried:
        raise UserError(f"no batch was tried as step {step} in {run.root}")
    if which is not None and not 1 <= which <= len(tried):
        raise UserError(f"--try {which}: step {step} was tried {len(tried)} times")
    number = which or len(tried)
    for i, record in enumerate(tried, start=1):
        print(f"{'*' if i == number else ' '} try {i}: {_describe(record)}", flush=True)
    record = tried[number - 1]
    attempt, first_token = record.attempt, record.first_token
    plan = plan_replay(read_run_config(run, attempt), run, attempt, first_token)
    # Before ranks are started that load for minutes.
    most = max_steps_again or MAX_STEPS_AGAIN
    plan.check(plan.checkpoint, most)
    nproc = plan.of_attempt["ranks"]
    arguments = (str(run.root), str(attempt), str(first_token), str(most))
    _check_machine(attempt, nproc, arguments)
    replayed = run_shared("pretrain.replay", arguments, nproc)
    _print(record, replayed)
    if replayed["differs"]:
        raise typer.Exit(1)


def _check_machine(attempt: int, nproc: int, arguments: tuple[str, ...]) -> None:
    """Refuse more ranks than this machine has room for. Raises UserError."""
    import torch

    gpus, cores = torch.cuda.device_count(), cores_here()
    if gpus:
        most, why = gpus, f"{gpus} GPUs, of which each rank takes one"
    else:
        most = RANKS_PER_CORE * cores
        why = f"no GPU and {cores} cores, of which at most {RANKS_PER_CORE} ranks share one"
    if nproc <= most:
        return
    module = " ".join(("pretrain.replay", *arguments))
    raise UserError(
        f"attempt {attempt} had {nproc} ranks, and this machine has {why}. Run the same number of "
        "ranks where there is room for them, as the run itself was, under torchrun on each of M "
        f"machines\n  torchrun --nnodes M --nproc-per-node {nproc}/M --rdzv-endpoint HOST:PORT "
        f"-m {module}\nor under srun, with RANK and LOCAL_RANK set as in slurm/rank.sh, and "
        "WORLD_SIZE, MASTER_ADDR and MASTER_PORT as in the environment.json of an attempt\n"
        f"  python -m {module}"
    )


def _describe(record: Trained | Skipped) -> str:
    became = f"skipped: {record.reason}" if isinstance(record, Skipped) else "trained"
    return (
        f"attempt {record.attempt}, tokens {record.first_token:,} to {record.stop_token:,}, loss "
        f"{record.loss!r}, gradient norm {record.grad_norm!r}, {became}"
    )


def _print(record: Trained | Skipped, replayed: dict[str, Any]) -> None:
    print(f"replayed: loss {replayed['loss']!r}, gradient norm {replayed['grad_norm']!r}")
    for rank, what in replayed["not_finite"].items():
        print(f"rank {rank}: {what}")
    if differs := replayed["differs"]:
        print("not bitwise as in the ledger:")
        for difference in differs[:DIFFERENCES_AT_MOST]:
            print(f"  {difference}")
        if (more := len(differs) - DIFFERENCES_AT_MOST) > 0:
            print(f"  and {more:,} more")
    else:
        print(_same(record, replayed["compared"]))
    for caveat in replayed["caveats"]:
        print(f"note: {caveat}")


def _same(record: Trained | Skipped, compared: int) -> str:
    """What is the same, and no more than that."""
    before = {0: "", 1: "the step before it"}.get(compared, f"the {compared:,} steps before it")
    of_step = f"loss and gradient norm of step {record.step}"
    if math.isnan(record.loss) or math.isnan(record.grad_norm):
        same = f"{of_step} are not numbers, as in the ledger, which proves little"
        return same + (f"; those of {before} are bitwise as there" if before else "")
    if before:
        return f"bitwise as in the ledger: {of_step}, and of {before}"
    return f"bitwise as in the ledger: {of_step}; no step before it was trained again"
