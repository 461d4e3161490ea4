"""Train a run in phases on 2 ranks, which test_phases.py may have killed at a switch.

Arguments: the run directory, and one of: nothing; `saving N`, to be killed when step N is about to
be saved; `switching N`, when it has been saved, and the next phase is about to begin; `damaging N`,
to find that checkpoint damaged then; `spikes`, and the batches, by their number in the stream,
whose gradient is much too large; `forgetting`, for rows that begin anew, perhaps with the steps in
which they do.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain import train as training
from pretrain.config import read_run_config
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer
from tests.resume.guard_case import numbers, spoil

real_save = Trainer.save


def die_saving(step: int) -> None:
    def save(self: Trainer, **options: Any) -> None:
        if self.progress.step == step:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        real_save(self, **options)

    Trainer.save = save  # type: ignore[method-assign]


def die_switching(step: int, run: RunDirectory) -> None:
    def release_groups() -> None:
        assert (run.checkpoints / f"step-{step:08d}").is_dir()
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)

    training.release_groups = release_groups  # type: ignore[assignment]


def damage_switching(step: int, run: RunDirectory) -> None:
    release = training.release_groups

    def release_groups() -> None:
        if dist.get_rank() == 0:
            for file in (run.checkpoints / f"step-{step:08d}").glob("*.safetensors"):
                file.write_bytes(b"\0" * file.stat().st_size)
        release()

    training.release_groups = release_groups


def forget(steps: set[int]) -> None:
    """Args: steps: none are all."""
    real_backward = Trainer.backward

    def backward(self: Trainer, *arguments: Any) -> Any:
        if not steps or self.progress.step + 1 in steps:
            self.engine.begin_rows_anew()
        return real_backward(self, *arguments)

    Trainer.backward = backward  # type: ignore[method-assign]


def main() -> None:
    directory, *how = sys.argv[1:]
    run = RunDirectory(Path(directory))
    if how[:1] == ["saving"]:
        die_saving(int(how[1]))
    elif how[:1] == ["switching"]:
        die_switching(int(how[1]), run)
    elif how[:1] == ["damaging"]:
        damage_switching(int(how[1]), run)
    elif how[:1] == ["forgetting"]:
        forget(set(map(int, how[1:])))
    elif how:
        spoil(set(), numbers(how[1]))
    code = training.train(read_run_config(run), run)
    dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
