"""How an attempt of a run begins, and where it goes on from."""

import os
import time
from pathlib import Path

from pretrain.checkpoint.store import on_rank_0, saved_steps
from pretrain.checkpoint.trained import checkpoints_of
from pretrain.config import Config
from pretrain.guard import Past
from pretrain.ledger import read_ledger
from pretrain.lineage import past_of_guard
from pretrain.run_dir import ATTEMPT_VARIABLE, RunDirectory


def begin_attempt(run: RunDirectory) -> int:
    """Let rank 0 begin the attempt that its launcher has made, or the next one. Collective."""
    made = os.environ.get(ATTEMPT_VARIABLE)
    return on_rank_0(lambda: run.begin_attempt(int(made) if made else None))


def process_started() -> float:
    """When this process was started, in seconds since the epoch: before it had Python, or torch.

    Where the system does not say, it is now.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return time.time()
    # proc(5): field 22, of which the first two have gone with the name.
    since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    # In this order: what passes between the two makes the start later, never too early.
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s
    return time.time() - age_s


def is_requeued() -> bool:
    """Whether Slurm has put the job of this attempt back into the queue since it was submitted."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def read_past(config: Config, run: RunDirectory) -> tuple[int, Past]:
    """The step of the checkpoint to go on from, if it is whole, and what the guard of the run has
    done. Collective.
    """
    return on_rank_0(lambda: _read_past(config, run))


def _read_past(config: Config, run: RunDirectory) -> tuple[int, Past]:
    step = max(saved_steps(checkpoints_of(config, run)), default=0)
    past = past_of_guard(read_ledger(run.ledger)) if run.ledger.exists() else Past()
    return step if past.go_back_to is None else min(step, past.go_back_to), past
