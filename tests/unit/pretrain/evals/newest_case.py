"""Which checkpoint of a run in two phases is evaluated; run on 2 ranks by test_newest.py.

Arguments: a run directory, without checkpoints, and the file for what each rank found.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.mesh import join_ranks
from pretrain.checkpoint import trained
from pretrain.checkpoint.store import checkpoint_in, saved_steps
from pretrain.checkpoint.target import Target
from pretrain.config import phases_of, read_run_config
from pretrain.errors import UserError
from pretrain.evals import long
from pretrain.evals.request import Request
from pretrain.run_dir import RunDirectory
from pretrain.trainer import Trainer

REQUEST = Request(tasks=("overwrite",), samples=1, pairs=1, values=1)


def train(run: RunDirectory, device: torch.device) -> None:
    """A step of each phase, and a checkpoint after it."""
    attempt = run.begin_attempt() if dist.get_rank() == 0 else 1
    for phase in phases_of(read_run_config(run)):
        trainer = Trainer(phase.config, run, device, attempt, first_step=phase.first)
        trainer.step(stop_requested=False)
        trainer.save(is_last=True)


def evaluated(run: RunDirectory) -> tuple[int, tuple[int, ...]]:
    with torch.no_grad():
        result = long.evaluate(run, REQUEST, [])
    return result.step, result.request.lengths


def refused(run: RunDirectory) -> str:
    """What is said where the newest checkpoint is removed once it has been found."""
    real = trained.CheckpointStore.load

    def load(self: Any, *state: Any, **options: Any) -> Any:
        if dist.get_rank() == 0:
            checkpoint_in(self.target, 2).remove()
        dist.barrier()
        return real(self, *state, **options)

    trained.CheckpointStore.load = load  # type: ignore[method-assign]
    try:
        evaluated(run)
    except UserError as error:
        return str(error)
    finally:
        trained.CheckpointStore.load = real  # type: ignore[method-assign]
    return "nothing"


def refused_to_keep(run: RunDirectory) -> str:
    """What is said where evaluations cannot be kept, before a model is loaded."""
    real = long.ShardedModel
    aside = run.root / "aside-evals"
    if dist.get_rank() == 0:
        run.evaluations.rename(aside)
        run.evaluations.touch()
    dist.barrier()
    del long.ShardedModel  # type: ignore[attr-defined]
    try:
        evaluated(run)
    except UserError as error:
        return str(error)
    finally:
        long.ShardedModel = real  # type: ignore[misc]
        dist.barrier()
        if dist.get_rank() == 0:
            run.evaluations.unlink()
            aside.rename(run.evaluations)
    return "nothing"


def damage(run: RunDirectory) -> None:
    if dist.get_rank() == 0:
        (path, *_) = sorted((run.checkpoints / "step-00000002").glob("*.safetensors"))
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    dist.barrier()


def see_one_checkpoint_less() -> None:
    """Let this rank list what is saved as it was before the newest checkpoint."""

    def stale(target: Target) -> list[int]:
        return saved_steps(target)[:-1]

    trained.saved_steps = stale


def main() -> None:
    directory, results = sys.argv[1:]
    device = join_ranks(timedelta(minutes=10))
    run = RunDirectory(Path(directory))
    train(run, device)
    # They are joined already.
    long.join_ranks = lambda timeout: device
    if dist.get_rank() == 1:
        see_one_checkpoint_less()
    mine: dict[str, Any] = {"whole": evaluated(run)}
    content = {path: path.read_bytes() for path in (run.checkpoints / "step-00000002").iterdir()}
    mine["unkept"] = refused_to_keep(run)
    mine["removed"] = refused(run)
    if dist.get_rank() == 0:
        next(iter(content)).parent.mkdir(exist_ok=True)
        for path, old in content.items():
            path.write_bytes(old)
    dist.barrier()
    trained.saved_steps = saved_steps
    damage(run)
    mine["damaged"] = evaluated(run)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    if dist.get_rank() == 0:
        torch.save(of_ranks, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
