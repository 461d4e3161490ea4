"""Train one step of a run again, and change nothing of the run.

Every rank of the same layout runs `python -m pretrain.replay RUN_DIR ATTEMPT FIRST_TOKEN`: the
attempt that tried the step, and the place of its batch in the stream. Rank 0 prints what it found
as one JSON object.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parallel.fsdp import local_tensor
from parallel.mesh import join_ranks
from pretrain.answer import answer
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.store import checkpoint_in, saved_steps
from pretrain.checkpoint.trained import checkpoints_of
from pretrain.config import Config, read_run_config
from pretrain.guard import Past
from pretrain.ledger import Record, Skipped, Trained, read_ledger
from pretrain.lineage import skipped_ranges
from pretrain.recorder import PASSED_OVER
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer

# Where in the model, and what.
Found = tuple[float, str]


@dataclass(frozen=True)
class Replayed:
    """
    Attributes:
        checkpoint: the step that the replay went on from; 0 is the beginning.
        loss, grad_norm: of the step, as they are now.
        differs: what is not bitwise as the ledger has it, of this step and of those before it.
        not_finite: the first output of a layer that is not finite, on each rank that has it; or
            else the gradients that are not.
    """

    checkpoint: int
    loss: float
    grad_norm: float
    differs: list[str]
    not_finite: dict[int, str]


def is_passed_over(record: Trained | Skipped) -> bool:
    return isinstance(record, Skipped) and record.reason == PASSED_OVER


def tries(records: list[Record], step: int) -> list[Trained | Skipped]:
    """Each time that a batch was computed as step `step`, in order."""
    return [
        record
        for record in records
        if isinstance(record, Trained | Skipped)
        and record.step == step
        and not is_passed_over(record)
    ]


def replay(config: Config, run: RunDirectory, attempt: int, first_token: int) -> Replayed:
    """Collective."""
    device = join_ranks(timedelta(seconds=config.train.collective_timeout_s))
    prepared: list[Any] = [None]
    if dist.get_rank() == 0:
        prepared = [_prepare(config, run, attempt, first_token)]
    dist.broadcast_object_list(prepared, src=0)
    target, before, skipped, up_to = prepared[0]
    trainer = Trainer(config, run, device, None, Past(skipped), up_to)
    checkpoint = trainer.progress.step
    differs: list[str] = []
    found: list[Found] = []
    while trainer.first_token != first_token or not trainer.plan.pieces.size:
        trainer.pass_over()
        batch = trainer.read_batch()
        assert trainer.first_token <= first_token, "the ledger has no batch that begins there"
        is_target = trainer.first_token == first_token
        hooks = _hooks(trainer, found) if is_target else []
        measured = trainer.backward(batch)
        for hook in hooks:
            hook.remove()
        if is_target and not found:
            found = _gradients(trainer.weights)
        grad_norm, _ = trainer.finish_step(measured)
        recorded = target if is_target else before.get(trainer.first_token)
        if recorded:
            differs += _differences(trainer.first_token, recorded, (measured.loss, grad_norm))
    return Replayed(checkpoint, measured.loss, grad_norm, differs, _first_of_all_ranks(found))


def _first_of_all_ranks(found: list[Found]) -> dict[int, str]:
    """The ranks on which it was earliest in the model: from there it went on to others."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, found)
    earliest = min((place for found in of_ranks for place, _ in found), default=0)
    return {
        rank: text
        for rank, found in enumerate(of_ranks)
        for place, text in found
        if place == earliest
    }


def _prepare(
    config: Config, run: RunDirectory, attempt: int, first_token: int
) -> tuple[tuple[float, float], dict[int, tuple[float, float]], list[tuple[int, int]], int]:
    """Loss and norm of the batch and of those before it, what had been skipped until then, and the
    newest step with a checkpoint that knows of nothing that was skipped later.
    """
    records = list(read_ledger(run.ledger))
    index = max(
        i
        for i, record in enumerate(records)
        if isinstance(record, Trained | Skipped)
        and (record.attempt, record.first_token) == (attempt, first_token)
        and not is_passed_over(record)
    )
    target: Any = records[index]
    before = {
        record.first_token: (record.loss, record.grad_norm)
        for record in records[:index]
        if isinstance(record, Trained) and record.attempt == attempt
    }
    skipped = skipped_ranges(records[:index])
    later = skipped_ranges(records[index:])
    limit = min([first_token, *(first for first, _ in later)])
    checkpoints = checkpoints_of(config, run)
    known = [
        step
        for step in saved_steps(checkpoints)
        if step < target.step and _tokens(checkpoint_in(checkpoints, step)) <= limit
    ]
    return (target.loss, target.grad_norm), before, skipped, max(known, default=0)


def _tokens(checkpoint: Any) -> int:
    """How many tokens the stream had delivered."""
    stream = Manifest.read(checkpoint).progress["stream"]
    return sum(cursor["tokens"] for cursor in stream["cursors"])


def _differences(
    first_token: int, recorded: tuple[float, float], measured: tuple[float, float]
) -> list[str]:
    return [
        f"{name} of the batch at token {first_token}: {theirs!r} in the ledger, {ours!r} now"
        for name, theirs, ours in zip(("loss", "gradient norm"), recorded, measured, strict=True)
        if theirs != ours and not (math.isnan(theirs) and math.isnan(ours))
    ]


def _hooks(trainer: Trainer, found: list[Found]) -> list[RemovableHandle]:
    """Let `found` be told the first module whose output is not finite."""

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not found:
            for tensor in _tensors(output):
                if not bool(tensor.isfinite().all()):
                    text = f"the output of {name} ({type(module).__name__}) is not finite"
                    found.append((_place_in_model(name), text))
                    return

    return [
        module.register_forward_hook(partial(look, name))
        for stage in trainer.parallelised.stages
        for name, module in stage.model.named_modules()
        if name
    ]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield local_tensor(output.detach())
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _place_in_model(name: str) -> float:
    """The number of the layer; -1 before the layers, infinity after them."""
    if name.startswith("layers."):
        return float(name.split(".")[1])
    return -1.0 if name.startswith("embedding") else math.inf


def _gradients(weights: nn.Module) -> list[Found]:
    """The weights whose gradients are not finite, where every output was."""
    names = [
        name
        for name, weight in weights.named_parameters()
        if weight.grad is not None and not bool(local_tensor(weight.grad).isfinite().all())
    ]
    if not names:
        return []
    text = f"every output is finite, the gradient of {names[-1]} is not ({len(names)} such)"
    return [(math.inf, text)]


def main() -> Replayed:
    directory, attempt, first_token = sys.argv[1:]
    run = RunDirectory(Path(directory))
    config = read_run_config(run, int(attempt))
    return replay(config, run, int(attempt), int(first_token))


if __name__ == "__main__":
    answer(main)
