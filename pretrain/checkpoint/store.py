"""The checkpoints of a run: each complete or absent, never half."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pretrain.checkpoint.manifest import find_damage, write_manifest
from pretrain.errors import UserError

PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a run has come: everything that is not a weight.

    Attributes:
        step: optimizer steps finished.
        tokens: tokens trained on.
        stream: the data stream's state, a few integers per source.
    """

    step: int
    tokens: int
    stream: dict[str, Any]


class CheckpointStore:
    """Saves to and loads from `folder`/step-NNNNNNNN, all ranks together."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self,
        progress: Progress,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        expert_frequencies: torch.Tensor,
    ) -> None:
        """Write a checkpoint aside, hash it, and rename it into place. Collective."""
        final = checkpoint_path(self.folder, progress.step)
        aside = self.folder / f".{final.name}"
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        dcp.save(_tensors(model, optimizer, expert_frequencies), checkpoint_id=aside)
        if dist.get_rank() == 0:
            (aside / PROGRESS).write_text(json.dumps(vars(progress)) + "\n")
            write_manifest(aside)
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in saved_steps(self.folder)[: -self.keep]:
                shutil.rmtree(checkpoint_path(self.folder, old))
        dist.barrier()

    def load(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        expert_frequencies: torch.Tensor,
    ) -> Progress | None:
        """Load the newest whole checkpoint in place; None if there is no checkpoint. Collective.

        The weights may be laid out over the ranks in another way than they were saved in.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        chosen = torch.tensor([newest_whole(self.folder) if dist.get_rank() == 0 else 0])
        dist.broadcast(chosen, src=0)
        if chosen < 0:
            return None
        path = checkpoint_path(self.folder, int(chosen))
        tensors = _tensors(model, optimizer, expert_frequencies)
        dcp.load(tensors, checkpoint_id=path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
        return Progress(**json.loads((path / PROGRESS).read_text()))


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, oldest first."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def newest_whole(folder: Path) -> int:
    """The newest step whose checkpoint is whole, -1 if there are no checkpoints.

    A damaged one is named on stderr and passed over.

    Raises:
        UserError: all are damaged.
    """
    steps = saved_steps(folder)
    damage = ""
    for step in reversed(steps):
        damage = find_damage(checkpoint_path(folder, step)) or ""
        if not damage:
            return step
        print(f"warning: checkpoint of step {step} is damaged: {damage}", file=sys.stderr)
    if steps:
        raise UserError(
            f"every checkpoint in {folder} is damaged, the oldest: {damage}. Restore one, or "
            "remove the folder to begin the run anew"
        )
    return -1


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, expert_frequencies: torch.Tensor
) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "expert_frequencies": expert_frequencies}
