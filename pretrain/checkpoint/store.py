"""The checkpoints of a run: each complete or absent, never half."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from pretrain.checkpoint.manifest import (
    Entries,
    describe_files,
    find_damage,
    list_files,
    write_manifest,
)
from pretrain.errors import UserError
from pretrain.optim import moments
from pretrain.run_dir import write_atomically

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
        weights: nn.Module,
        optimizer: torch.optim.AdamW,
        routers: Mapping[str, Tensor],
    ) -> None:
        """Write a checkpoint aside, hash it, and rename it into place. Collective."""
        final = checkpoint_path(self.folder, progress.step)
        aside = self.folder / f".{final.name}"
        if dist.get_rank() == 0:
            aside.mkdir(parents=True)
            write_atomically(aside / PROGRESS, json.dumps(vars(progress)) + "\n")
        dist.barrier()
        dcp.save(_tensors(weights, optimizer, routers), checkpoint_id=aside)
        files = _describe_together(aside)
        if dist.get_rank() == 0:
            write_manifest(aside, files)
            aside.rename(final)
            _sync(self.folder)
            for old in saved_steps(self.folder)[: -self.keep]:
                shutil.rmtree(checkpoint_path(self.folder, old))
        dist.barrier()

    def load(
        self,
        weights: nn.Module,
        optimizer: torch.optim.AdamW,
        routers: Mapping[str, Tensor],
    ) -> Progress | None:
        """Load the newest whole checkpoint in place; None if there is no checkpoint. Collective.

        The weights may be laid out over the ranks in another way than they were saved in. Newer
        checkpoints, which are damaged, are set aside as damaged-step-NNNNNNNN.

        Raises:
            UserError: there are checkpoints, and all of them are damaged.
        """
        steps = _from_rank_0(saved_steps(self.folder))
        step = newest_whole(self.folder, steps, _find_damage_together)
        if dist.get_rank() == 0:
            self._clear_away_newer_than(step)
        if step is None:
            return None
        path = checkpoint_path(self.folder, step)
        dcp.load(_tensors(weights, optimizer, routers), checkpoint_id=path)
        return Progress(**json.loads((path / PROGRESS).read_text()))

    def _clear_away_newer_than(self, step: int | None) -> None:
        for unfinished in self.folder.glob(".step-*"):
            shutil.rmtree(unfinished)
        for newer in saved_steps(self.folder):
            if step is not None and newer > step:
                path = checkpoint_path(self.folder, newer)
                damaged = self.folder / f"damaged-{path.name}"
                shutil.rmtree(damaged, ignore_errors=True)
                path.rename(damaged)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, oldest first."""
    names = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def newest_whole(
    folder: Path, steps: list[int], damage_of: Callable[[Path], str | None] = find_damage
) -> int | None:
    """The newest of `steps` whose checkpoint is whole, None if there are none.

    A damaged one is named on stderr and passed over.

    Raises:
        UserError: all are damaged.
    """
    damage = None
    for step in reversed(steps):
        damage = damage_of(checkpoint_path(folder, step))
        if not damage:
            return step
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"warning: the checkpoint of step {step} is damaged: {damage}", file=sys.stderr)
    if damage:
        raise UserError(
            f"every checkpoint in {folder} is damaged, the oldest: {damage}. Restore one, or "
            "remove the folder to begin the run anew"
        )
    return None


def _tensors(
    weights: nn.Module, optimizer: torch.optim.AdamW, routers: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The tensors themselves, by names that no layout changes: loading fills them in place."""
    named = dict(weights.named_parameters())
    return {
        "model": {name: weight.detach() for name, weight in named.items()},
        "optimizer": {
            "state": {name: moments(optimizer, weight) for name, weight in named.items()}
        },
        "routers": dict(routers),
    }


def _from_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gather(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _describe_together(folder: Path) -> Entries:
    """Size and sha256 of every file; the ranks share the work."""
    names = _from_rank_0(list_files(folder))
    mine = names[dist.get_rank() :: dist.get_world_size()]
    parts: list[Entries] = _gather(describe_files(folder, mine))
    return {name: entry for part in parts for name, entry in part.items()}


def _find_damage_together(folder: Path) -> str | None:
    """`find_damage`; the ranks share the work and agree."""
    found = _gather(find_damage(folder, dist.get_rank(), dist.get_world_size()))
    return next((damage for damage in found if damage), None)


def _sync(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
