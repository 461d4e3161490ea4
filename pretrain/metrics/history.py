"""metrics.jsonl read into arrays that are small enough to draw."""

from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.metrics.sinks import read_metrics

Floats = NDArray[np.float64]

MAX_COLUMNS = 400
MAX_CELLS = 1_000_000
LEVELS_PER_UNIT = 64
NO_DATA = 255


@dataclass(frozen=True)
class Series:
    """The values of one metric at the steps that have it, both [n]."""

    step: Floats
    value: Floats

    def non_finite_steps(self) -> list[int]:
        return [int(step) for step in self.step[~np.isfinite(self.value)]]


@dataclass(frozen=True)
class LoadHistory:
    """Expert loads over the steps, averaged within columns of equal width.

    Attributes:
        level: [layers, experts, columns] uint8: load * experts * LEVELS_PER_UNIT, so that balanced
            routing is LEVELS_PER_UNIT; NO_DATA where no step was logged.
        first_step: left edge of the first column.
        last_step: right edge of the last column.
    """

    level: NDArray[np.uint8]
    first_step: float
    last_step: float


@dataclass(frozen=True)
class History:
    """All logged steps of a run: one Series per scalar metric, and the expert loads."""

    rows: int
    series: dict[str, Series]
    load: LoadHistory | None

    def last(self, name: str) -> float | None:
        """The metric's last value, or None if it was never logged."""
        series = self.series.get(name)
        return None if series is None else float(series.value[-1])


def read_history(path: Path) -> History:
    """Read metrics.jsonl, which may be missing; rows are streamed, twice if there are loads."""
    columns: dict[str, tuple[array[float], array[float]]] = defaultdict(
        lambda: (array("d"), array("d"))
    )
    load_steps: list[float] = []
    rows = 0
    for row in read_metrics(path) if path.exists() else ():
        rows += 1
        for name, value in row.items():
            if isinstance(value, int | float):
                steps, values = columns[name]
                steps.append(row["train/step"])
                values.append(value)
        if row.get("moe/load"):
            load_steps.append(row["train/step"])
    series = {
        name: Series(np.frombuffer(steps), np.frombuffer(values))
        for name, (steps, values) in columns.items()
    }
    load = _average_loads(read_metrics(path), load_steps) if load_steps else None
    return History(rows, series, load)


def _average_loads(rows: Iterable[dict[str, Any]], steps: list[float]) -> LoadHistory:
    spacing = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 1.0
    left, right = steps[0] - spacing / 2, steps[-1] + spacing / 2
    total: Floats | None = None
    for row in rows:
        if not row.get("moe/load"):
            continue
        load = np.asarray(row["moe/load"])
        if total is None:
            columns = max(1, min(MAX_COLUMNS, len(steps), MAX_CELLS // load.size))
            total, count = np.zeros((*load.shape, columns)), np.zeros(columns)
        column = int((row["train/step"] - left) / (right - left) * columns)
        total[..., column] += load * load.shape[-1]
        count[column] += 1
    assert total is not None
    level = np.round(total / np.maximum(count, 1) * LEVELS_PER_UNIT).clip(0, NO_DATA - 1)
    level[..., count == 0] = NO_DATA
    return LoadHistory(level.astype(np.uint8), left, right)


def smooth(value: Floats, rows: int) -> Floats:
    """Exponential mean over about `rows` values, without the bias of its start.

    Values that are not finite are left out of the mean and stay NaN.
    """
    keep = 1 - 2 / (rows + 1)
    mean = weight = 0.0
    smoothed = np.full_like(value, np.nan)
    for i in np.flatnonzero(np.isfinite(value)):
        mean = keep * mean + (1 - keep) * value[i]
        weight = keep * weight + (1 - keep)
        smoothed[i] = mean / weight
    return smoothed


def thin(value: Floats, limit: int) -> NDArray[np.intp]:
    """Indices of about `limit` values that keep every spike and a sign of each gap.

    Of each run of neighbours, the smallest, the largest and the first that is not finite stay.
    """
    if len(value) <= limit:
        return np.arange(len(value))
    kept: list[int] = []
    for bucket in np.array_split(np.arange(len(value)), limit // 2):
        is_finite = np.isfinite(value[bucket])
        finite, gaps = bucket[is_finite], bucket[~is_finite]
        if finite.size:
            kept += [finite[value[finite].argmin()], finite[value[finite].argmax()]]
        kept += gaps[:1].tolist()
    return np.unique(np.array(kept, dtype=np.intp))
