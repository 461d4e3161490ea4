"""Train with batches whose gradients are spoilt; run on 2 ranks by test_guard.py.

Arguments: the run directory; the batches, by their number in the stream, whose gradient is NaN on
the last rank; and those whose gradient is much too large: each as `1,2,3`.
"""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain.config import read_run_config
from pretrain.run_dir import RunDirectory
from pretrain.train import train
from pretrain.trainer import Trainer

real_backward = Trainer.backward


def numbers(text: str) -> set[int]:
    return {int(number) for number in text.split(",") if number}


def main() -> None:
    run = RunDirectory(Path(sys.argv[1]))
    without_number, too_large = map(numbers, sys.argv[2:])

    def backward(self: Trainer, *arguments: Any) -> Any:
        measured = real_backward(self, *arguments)
        batch = self.first_token // self.tokens_per_step
        factor = 1.0
        if batch in without_number and dist.get_rank() == dist.get_world_size() - 1:
            factor = float("nan")
        if batch in too_large:
            factor = 1e3
        for weight in self.weights.parameters():
            weight.grad.mul_(factor)
        return measured

    Trainer.backward = backward  # type: ignore[method-assign]
    code = train(read_run_config(run), run)
    dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
