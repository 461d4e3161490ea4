"""What the report shows of the newest `farspan eval --suite long`: heat maps of accuracy."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pretrain.metrics.registry import help_of
from pretrain.run_dir import RunDirectory


class GridRow(NamedTuple):
    """Shares by length, 0 to 1."""

    label: str
    help: str
    shares: tuple[float, ...]


class Grid(NamedTuple):
    """A heat map: rows by task or depth, columns by length."""

    title: str
    rows: tuple[GridRow, ...]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as the page needs it.

    Attributes:
        samples: documents of each kind.
        chance: of guessing a token of an answer.
        loss_by_position: as `Bucket` of pretrain.evals.by_position.
        loss_help: what it tells.
    """

    step: int
    form: str
    samples: int
    chance: float
    lengths: Sequence[int]
    grids: Sequence[Grid]
    loss_by_position: Sequence[Mapping[str, Any]]
    loss_help: str


def read_evaluation(run: RunDirectory) -> Evaluation | None:
    """Of the newest checkpoint that was evaluated; None if there is none."""
    files = sorted(run.evaluations.glob("long-*.json"))
    if not files:
        return None
    tree = json.loads(files[-1].read_text())
    lengths, cells = tree["request"]["lengths"], tree["cells"]
    by_task = {
        task: [cell for cell in cells if cell["task"] == task] for task in tree["request"]["tasks"]
    }
    grids = []
    if by_task:
        rows = (
            GridRow(task, help_of(f"eval/{task}"), _shares(of_task, lengths))
            for task, of_task in by_task.items()
        )
        grids.append(Grid("Task", tuple(rows)))
    by_depth = defaultdict(list)
    for cell in by_task.get("needle", ()):
        by_depth[cell["depth"]].append(cell)
    if by_depth:
        rows = (
            GridRow(f"{depth:.0%}", "", _shares(by_depth[depth], lengths))
            for depth in sorted(by_depth)
        )
        grids.append(Grid("Needle at depth", tuple(rows)))
    return Evaluation(
        tree["step"],
        tree["form"],
        tree["request"]["samples"],
        tree["chance"],
        lengths,
        grids,
        tree["loss_by_position"],
        help_of("eval/loss_by_position"),
    )


def _shares(cells: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> tuple[float, ...]:
    """Questions answered rightly, over all of these cells that have the same length."""
    return tuple(
        sum(cell["right"] for cell in of_length) / sum(cell["questions"] for cell in of_length)
        for length in lengths
        for of_length in [[cell for cell in cells if cell["length"] == length]]
    )
