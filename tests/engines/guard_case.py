"""Train with batches that are spoilt on purpose, under any engine; run on 2 ranks by test_runs.py.

Arguments: the run directory; then, if batches are to be spoilt, the one, by its number in the
stream, for which a layer of the last rank gives NaN, and the one in which every token is to be
followed by the same one.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from data_pipeline.stream import Batch
from pretrain.config import read_run_config
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.run_dir import RunDirectory
from pretrain.train import train
from pretrain.trainer import Trainer

real_backward = Trainer.backward


def feed_forward(engine: Any) -> nn.Module:
    """Of a layer in the middle."""
    match type(engine).__name__:
        case "NativeEngine":
            return engine.parallelised.stages[0].model.layers["2"].moe
        case "MegatronEngine":
            return engine.models[0].decoder.layers[2].mlp
        case "DeepSpeedEngine":
            return engine.model.layers["2"].moe
        case other:
            raise AssertionError(other)


def without_number(module: nn.Module, inputs: Any, output: Any) -> Any:
    first, *others = output
    return (first * float("nan"), *others)


def spoil(nan_in: int, same_in: int) -> None:
    def backward(self: Trainer, batch: Batch, *arguments: Any) -> Any:
        number = self.first_token // self.tokens_per_step
        if number == same_in:
            labels = np.where(batch.labels == IGNORED, IGNORED, 5).astype(batch.labels.dtype)
            batch = replace(batch, labels=labels)
        if number != nan_in or dist.get_rank() < dist.get_world_size() - 1:
            return real_backward(self, batch, *arguments)
        hook = feed_forward(self.engine).register_forward_hook(without_number)
        measured = real_backward(self, batch, *arguments)
        hook.remove()
        return measured

    Trainer.backward = backward  # type: ignore[method-assign]


def main() -> None:
    directory, *spoilt = sys.argv[1:]
    run = RunDirectory(Path(directory))
    if spoilt:
        spoil(*map(int, spoilt))
    code = train(read_run_config(run), run)
    dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
