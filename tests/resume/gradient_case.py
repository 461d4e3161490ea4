"""Train, or replay, with a batch for which one layer has outputs but no finite gradient.

Run on 2 ranks by test_guard.py. Arguments: the run directory, the batch by its number in the
stream; to replay it, also the attempt, its first token, and the file for the result.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pretrain.config import read_run_config
from pretrain.replay import replay
from pretrain.run_dir import RunDirectory
from pretrain.train import train
from pretrain.trainer import Trainer
from tests.resume.guard_case import SPOILT_LAYER


def spoil_gradient(number: int) -> None:
    real = Trainer.backward

    def spoil(*call: Any) -> None:
        output: Tensor = call[-1]
        output.register_hook(lambda gradient: gradient * float("nan"))

    def backward(self: Trainer, *arguments: Any) -> Any:
        if self.first_token // self.tokens_per_step != number:
            return real(self, *arguments)
        moe = self.engine.parallelised.stages[0].model.layers[SPOILT_LAYER].moe
        hook = moe.shared_expert.register_forward_hook(spoil)
        measured = real(self, *arguments)
        hook.remove()
        return measured

    Trainer.backward = backward  # type: ignore[method-assign]


def main() -> None:
    directory, number, *others = sys.argv[1:]
    run = RunDirectory(Path(directory))
    spoil_gradient(int(number))
    code = 0
    if others:
        attempt, first_token, result = others
        found = replay(read_run_config(run, int(attempt)), run, int(attempt), int(first_token))
        Path(result).write_text(json.dumps(asdict(found)))
    else:
        code = train(read_run_config(run), run)
    dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
