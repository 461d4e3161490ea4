"""The loss on held-out text, taken while training goes on, in its layout."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from data_pipeline.stream import Batch, OnceThrough
from parallel.segments.runner import SegmentedStage
from pretrain.checkpoint.store import on_rank_0
from pretrain.config import Config
from pretrain.engines.native import NativeEngine
from pretrain.evals.forward import ForwardPass
from pretrain.evals.held_out_data import open_held_out
from pretrain.metrics.sinks import row_lacks
from pretrain.metrics.step import Clock
from pretrain.model.kernels.documents import Documents
from pretrain.recorder import Recorder
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer

LOSS = "eval/heldout_loss"


class _UnwantedError(Exception):
    """All ranks give up an evaluation."""


class HeldOut:
    """Each source's cross-entropy per token, over the same rows at each step. Collective.

    Every token is predicted once, from its row alone, and nothing is dropped. The training does not
    notice: weights, routers, data and memory of lanes stay as they are.

    Args:
        config: of the whole run, of which that of `trainer` may be a phase.
    """

    def __init__(self, config: Config, trainer: Trainer) -> None:
        self._config = config
        self._sources = open_held_out(config, trainer.stream)
        if not self._sources:
            return
        assert isinstance(trainer.engine, NativeEngine), "others are refused with eval.every"
        self._engine = trainer.engine
        self._stages = self._engine.parallelised.stages
        runner = self._engine.parallelised.runner
        self._pass = ForwardPass(
            trainer.config,
            trainer.layout,
            self._engine.mesh,
            self._stages,
            trainer.device,
            runner.store if isinstance(runner, SegmentedStage) else None,
        )

    def is_due(self, step: int) -> bool:
        """Whether the row of a step tells of it: at the end, and every so many steps."""
        return _is_due(self._config, step)

    def evaluate(
        self,
        beat: Callable[..., None] = lambda phase, is_slow: None,
        is_unwanted: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any] | None:
        """The metrics of the weights as they are, and how long they took.

        Args:
            beat: told now and then that this phase goes on.
            is_unwanted: asked now and then; where one rank says so, all give up and return None.
        """
        clock = Clock()
        try:
            with clock:
                losses = self._losses(partial(beat, "evaluation", is_slow=True), is_unwanted)
        except _UnwantedError:
            return None
        perplexity = {name: float(np.exp(loss)) for name, loss in losses.items()}
        return {
            LOSS: losses,
            "eval/heldout_perplexity": perplexity,
            "perf/evaluation_s": clock.take(),
        }

    def _losses(
        self, beat: Callable[[], None], is_unwanted: Callable[[], bool]
    ) -> dict[str, float]:
        for stage in self._stages:
            stage.eval()
        try:
            return {
                name: self._loss(source, beat, is_unwanted)
                for name, source in self._sources.items()
            }
        finally:
            for stage in self._stages:
                stage.train()
                _reshard(stage)
            # Or the next step would seem to have waited as long.
            self._engine.parallelised.take_waited_s()

    def _loss(
        self, source: OnceThrough, beat: Callable[[], None], is_unwanted: Callable[[], bool]
    ) -> float:
        """In nats per predicted token, the same on all ranks."""
        mesh = self._engine.mesh
        here = self._pass.rows_at_a_time(source.seq_len)
        summed = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        for first in range(0, source.rows, here * mesh.data_ranks):
            beat()
            if _any_rank(is_unwanted()):
                raise _UnwantedError
            mine = first + mesh.data_rank * here
            summed += self._summed(source.read(range(mine, mine + here), beat))
        dist.all_reduce(summed)
        loss, tokens = summed.tolist()
        return loss / tokens if tokens else math.nan

    def _summed(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy, and how many labels it is of; the sum over ranks is the whole: [2]."""
        documents = Documents.from_position(torch.from_numpy(batch.position))
        labels = torch.from_numpy(batch.labels)
        places = self._pass.run(torch.from_numpy(batch.tokens), labels, documents)
        is_last = any(stage.is_last for stage in self._stages)
        # Ranks of tp have each seen the loss of all their tokens.
        share = 1 / self._engine.mesh.tp.size() if is_last else 0.0
        total = sum(stage.cross_entropy for stage in self._stages)
        return torch.stack(
            [
                torch.as_tensor(total, dtype=torch.float64, device=self._engine.device) * share,
                torch.tensor(len(places) * share, dtype=torch.float64, device=self._engine.device),
            ]
        )


def lacks_evaluation(config: Config, run: RunDirectory, step: int) -> bool:
    """Whether the attempt that trained a step was stopped before its evaluation, which is to be
    made with the settings of that step. Collective.
    """
    return _is_due(config, step) and on_rank_0(lambda: row_lacks(run.metrics, step, LOSS))


def evaluate_late(
    held_out: HeldOut,
    step: int,
    recorder: Recorder | None,
    beat: Callable[..., None],
    is_unwanted: Callable[[], bool],
) -> bool:
    """Add to the row of a step what it lacks, as the attempt that trained it was stopped there.
    Collective.

    Returns:
        False if it has given up, and is left to the next attempt.
    """
    if not held_out.is_due(step):
        return True
    if _any_rank(recorder is not None and recorder.lacks(step, LOSS)):
        evaluated = held_out.evaluate(beat, is_unwanted)
        if evaluated is None:
            return False
        if recorder:
            recorder.amend(evaluated)
    return True


def _is_due(config: Config, step: int) -> bool:
    every = config.eval.every
    return every > 0 and step > 0 and (step % every == 0 or step == config.train.steps)


def _any_rank(is_so: bool) -> bool:
    found = torch.tensor(int(is_so))
    dist.all_reduce(found)
    return bool(found)


def _reshard(stage: torch.nn.Module) -> None:
    """Give back the weights that a forward pass leaves gathered for a backward pass to come."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
