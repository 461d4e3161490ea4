"""Train a run that test_held_out.py interrupts.

Arguments: the run directory, and perhaps `stop N`, to be asked to stop so that step N is the last,
`stop evaluating`, in the first evaluation, or `kill N`, when step N is about to be saved.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.config import read_run_config
from pretrain.errors import STOPPED_ON_REQUEST
from pretrain.evals.held_out import HeldOut
from pretrain.run_dir import RunDirectory
from pretrain.train import train
from pretrain.trainer import StepResult, Trainer
from tests.resume.phases_case import die_saving

real_step, real_evaluate = Trainer.step, HeldOut.evaluate


def stop_after(step: int) -> None:
    def step_and_ask(self: Trainer, *arguments: Any) -> StepResult:
        if self.progress.step == step - 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(self, *arguments)

    Trainer.step = step_and_ask  # type: ignore[method-assign]


def stop_evaluating() -> None:
    def ask_and_evaluate(self: HeldOut, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real_evaluate(self, *arguments)

    HeldOut.evaluate = ask_and_evaluate  # type: ignore[method-assign]


def main() -> None:
    directory, *how = sys.argv[1:]
    run = RunDirectory(Path(directory))
    if how == ["stop", "evaluating"]:
        stop_evaluating()
    elif how[:1] == ["stop"]:
        stop_after(int(how[1]))
    elif how[:1] == ["kill"]:
        die_saving(int(how[1]))
    code = train(read_run_config(run), run)
    assert code == (STOPPED_ON_REQUEST if how[:1] == ["stop"] else 0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
