"""What W&B lacks of a run, from one look at all that it has."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.wandb_sync import Arrival, WandbHistory, compare_now
from pretrain.run_dir import RunDirectory


class History(WandbHistory):
    """These rows, in the order in which they came.

    Attributes:
        scans: how often they were asked for.
    """

    def __init__(self, *rows: Mapping[str, Any]) -> None:
        self._stored = rows
        self.scans = 0

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        self.scans += 1
        yield from self._stored


def row(step: int, **values: float) -> dict[str, Any]:
    return {"train/step": step, "_timestamp": 1.5, **values}


def compared(folder: Path, *rows: Mapping[str, Any]) -> Arrival:
    """With steps 1 and 2, each with a loss of 5 and a norm of 1."""
    run, history = RunDirectory(folder), History(*rows)
    lines = (f'{{"train/step": {step}, "loss": 5.0, "norm": 1.0}}\n' for step in (1, 2))
    run.metrics.write_text("".join(lines))
    found = compare_now(run, 2, history)
    assert history.scans == 1
    return found


def test_rows_that_came_in_parts_are_there(tmp_path: Path) -> None:
    parts = (row(1, loss=5.0), row(2, loss=5.0, norm=1.0), row(1, norm=1.0))
    assert compared(tmp_path, *parts) == Arrival(rows=2, missing={}, undone=0)


def test_what_w_and_b_has_in_part_not_at_all_or_too_much(tmp_path: Path) -> None:
    found = compared(tmp_path, row(1, loss=5.0, norm=2.0), row(3, loss=4.0))
    assert found == Arrival(rows=2, missing={1: frozenset({"norm"}), 2: None}, undone=1)


def test_the_value_that_came_last_counts(tmp_path: Path) -> None:
    """A fragment of an attempt that was undone may be sent late."""
    whole = [row(step, loss=5.0, norm=1.0) for step in (1, 2)]
    late = row(1, loss=7.0)
    assert compared(tmp_path, *whole, late).missing == {1: frozenset({"loss"})}
    assert compared(tmp_path, *whole, late, row(1, loss=5.0)).missing == {}
    assert compared(tmp_path, late, *whole).missing == {}
