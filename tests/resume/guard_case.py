"""Train with batches that are spoilt on purpose; run on 2 ranks by test_guard.py.

Arguments: the run directory; the batches, by their number in the stream, for which a layer of the
last rank gives NaN; those whose gradient is much too large: each as `1,2,3`. Then `dies in rollback
N` if it is to be killed there. If a batch is to be replayed instead: the attempt, its first token,
and the file for the result.
"""

import json
import os
import signal
import sys
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.config import read_run_config
from pretrain.replay import replay
from pretrain.run_dir import RunDirectory
from pretrain.train import train
from pretrain.trainer import Trainer

SPOILT_LAYER = "2"
real_backward = Trainer.backward


def numbers(text: str) -> set[int]:
    return {int(number) for number in text.split(",") if number}


def spoil(without_number: set[int], too_large: set[int]) -> None:
    def backward(self: Trainer, *arguments: Any) -> Any:
        batch = self.first_token // self.tokens_per_step
        is_last = dist.get_rank() == dist.get_world_size() - 1
        factor = float("nan") if batch in without_number and is_last else 1.0
        moe = self.engine.parallelised.stages[0].model.layers[SPOILT_LAYER].moe
        hook = moe.shared_expert.register_forward_hook(lambda *call: call[-1] * factor)
        measured = real_backward(self, *arguments)
        hook.remove()
        if batch in too_large:
            for weight in self.engine.weights.parameters():
                weight.grad.mul_(1e3)
        return measured

    Trainer.backward = backward  # type: ignore[method-assign]


def die_in_rollback(number: int) -> None:
    real, calls = Trainer.roll_back, count(1)

    def roll_back(self: Trainer, rollback: Any) -> None:
        if next(calls) == number:
            dist.barrier()  # rank 0 has written down what it is about to do
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, rollback)

    Trainer.roll_back = roll_back  # type: ignore[method-assign]


def main() -> None:
    directory, without_number, too_large, *others = sys.argv[1:]
    run = RunDirectory(Path(directory))
    spoil(numbers(without_number), numbers(too_large))
    code = 0
    if len(others) == 1:
        die_in_rollback(int(others[0].removeprefix("dies in rollback ")))
    if len(others) == 3:
        attempt, first_token, result = others
        found = replay(read_run_config(run, int(attempt)), run, int(attempt), int(first_token))
        Path(result).write_text(json.dumps(asdict(found)))
    else:
        code = train(read_run_config(run), run)
    dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
