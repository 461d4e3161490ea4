"""Series of any length in bounded memory: what is drawn of them keeps every spike."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MAX_BUCKETS = 1500
MAX_COLUMNS = 512
MAX_CELLS = 1_000_000
STEPS_NAMED = 10


@dataclass(frozen=True)
class Series:
    """What is drawn of one metric; values that are not finite are NaN.

    Attributes:
        step, value: [n]; each row, or of long runs the smallest and the largest of each bucket of
            rows, its first and its last gap, and the first and the last row.
        mean_step, mean: [buckets], over the finite values of each bucket.
        rows: how many were logged.
        non_finite: how many of them are not finite.
        non_finite_first: the steps of the first of those.
    """

    step: Floats
    value: Floats
    mean_step: Floats
    mean: Floats
    rows: int
    non_finite: int
    non_finite_first: tuple[float, ...]

    def non_finite_steps(self) -> list[int]:
        """The first ten; `non_finite` counts all."""
        return [int(step) for step in self.non_finite_first]


@dataclass(frozen=True)
class StepMap:
    """A metric that is a list, averaged within columns of equal width.

    Attributes:
        mean: [*shape, columns] float32, NaN where nothing finite was logged.
        first_step: left edge of the first column.
        last_step: right edge of the last column.
    """

    mean: NDArray[np.float32]
    first_step: float
    last_step: float


# Of a bucket: its smallest and largest value and their steps, the steps of its first and last gap,
# and sums over its finite values. NaN: there is none.
LOW, LOW_STEP, HIGH, HIGH_STEP, GAP_STEP, LAST_GAP_STEP, TOTAL, STEP_TOTAL, FINITE = range(9)
FIELDS = FINITE + 1


class Downsampler:
    """Takes the rows of a metric one block after another, and keeps buckets of equally many.

    When there are more than MAX_BUCKETS, neighbours merge. What is kept does not depend on how the
    rows came in blocks.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._bucket_rows = 2
        self._buckets = np.empty((FIELDS, 0))
        self._ends = np.empty((2, 0))
        self._non_finite = 0
        self._non_finite_first: list[float] = []

    def add(self, step: Floats, value: Floats) -> None:
        """Add rows, both [n], n > 0."""
        gaps = step[~np.isfinite(value)]
        self._non_finite += len(gaps)
        self._non_finite_first += gaps[: STEPS_NAMED - len(self._non_finite_first)].tolist()
        value = np.where(np.isfinite(value), value, np.nan)
        ends = np.array([step[[0, -1]], value[[0, -1]]])
        self._ends = np.concatenate([self._ends[:, :1], ends], axis=1)[:, [0, -1]]

        filled = self._rows % self._bucket_rows
        buckets = _bucketed(step, value, filled, self._bucket_rows)
        if filled:
            seam = _merge(np.stack([self._buckets[:, -1:], buckets[:, :1]], axis=-1))
            buckets = np.concatenate([self._buckets[:, :-1], seam, buckets[:, 1:]], axis=1)
        else:
            buckets = np.concatenate([self._buckets, buckets], axis=1)
        self._rows += len(step)
        while buckets.shape[1] > MAX_BUCKETS:
            buckets = _merge_neighbours(buckets)
            self._bucket_rows *= 2
        self._buckets = buckets

    def series(self) -> Series:
        low, low_step, high, high_step, *gap_steps, total, step_total, finite = self._buckets
        gaps = np.concatenate(gap_steps)
        step = np.concatenate([self._ends[0], low_step, high_step, gaps])
        value = np.concatenate([self._ends[1], low, high, np.full_like(gaps, np.nan)])
        is_there = ~np.isnan(step)
        step, value = step[is_there], value[is_there]
        order = np.lexsort((value, step))
        step, value = step[order], value[order]
        is_same = (value[1:] == value[:-1]) | (np.isnan(value[1:]) & np.isnan(value[:-1]))
        is_new = np.concatenate([[True], (step[1:] != step[:-1]) | ~is_same])
        with np.errstate(invalid="ignore"):
            mean, mean_step = total / finite, step_total / finite
        # An empty bucket breaks the line of means where its gap is.
        mean_step = np.where(finite > 0, mean_step, gap_steps[0])
        if self._bucket_rows == 2:
            mean_step, mean = step[is_new], value[is_new]
        return Series(
            step[is_new],
            value[is_new],
            mean_step,
            mean,
            self._rows,
            self._non_finite,
            tuple(self._non_finite_first),
        )

    @property
    def last(self) -> float:
        """The last value, NaN if it is not finite."""
        return float(self._ends[1, -1])


def _bucketed(step: Floats, value: Floats, filled: int, rows: int) -> Floats:
    """Rows as buckets [FIELDS, buckets], of which the first has `filled` rows from before."""
    buckets = -(-(filled + len(step)) // rows)
    padded = np.full((3, buckets * rows), np.nan)
    here = slice(filled, filled + len(step))
    padded[0, here], padded[1, here] = step, value
    padded[2, here] = np.where(np.isnan(value), step, np.nan)
    steps, values, gaps = padded.reshape(3, buckets, rows)
    finite = ~np.isnan(values)
    lowest = np.where(finite, values, np.inf).argmin(1)[:, None]
    # Of equal values the first as the smallest and the last as the largest: two rows stay two.
    highest = rows - 1 - np.where(finite, values, -np.inf)[:, ::-1].argmax(1)[:, None]
    has_any = finite.any(1)

    def at(array: Floats, index: NDArray[np.intp]) -> Floats:
        return np.where(has_any, np.take_along_axis(array, index, 1)[:, 0], np.nan)

    return np.stack(
        [
            at(values, lowest),
            at(steps, lowest),
            at(values, highest),
            at(steps, highest),
            np.fmin.reduce(gaps, axis=1),
            np.fmax.reduce(gaps, axis=1),
            np.where(finite, values, 0).sum(1),
            np.where(finite, steps, 0).sum(1),
            finite.sum(1),
        ]
    )


def _merge_neighbours(buckets: Floats) -> Floats:
    if buckets.shape[1] % 2:
        empty = np.full((FIELDS, 1), np.nan)
        empty[TOTAL:] = 0
        buckets = np.concatenate([buckets, empty], axis=1)
    return _merge(buckets.reshape(FIELDS, -1, 2))


def _merge(pairs: Floats) -> Floats:
    """[FIELDS, buckets, 2] -> [FIELDS, buckets]."""
    first, second = pairs[..., 0], pairs[..., 1]
    merged = first + second
    takes_second = (second[LOW] < first[LOW]) | np.isnan(first[LOW])
    merged[[LOW, LOW_STEP]] = np.where(takes_second, second[:2], first[:2])
    takes_second = (second[HIGH] >= first[HIGH]) | np.isnan(first[HIGH])
    merged[[HIGH, HIGH_STEP]] = np.where(takes_second, second[2:4], first[2:4])
    merged[GAP_STEP] = np.fmin(first[GAP_STEP], second[GAP_STEP])
    merged[LAST_GAP_STEP] = np.fmax(first[LAST_GAP_STEP], second[LAST_GAP_STEP])
    return merged


class ColumnAverager:
    """Averages a metric that is a list within columns of steps, whose width doubles as they grow.

    Lists may become longer; values that are not finite are left out.
    """

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self._width = 1
        self._total = np.zeros((0,) + (0,) * dimensions)
        self._count = np.zeros_like(self._total, dtype=np.int32)
        self._rows = 0
        self._first, self._last = np.inf, -np.inf

    def add(self, step: Floats, value: Floats) -> None:
        """Add rows: step [n] of at least 0, value [n, *shape], n > 0, shape without a zero."""
        self._rows += len(step)
        self._first = min(self._first, step.min())
        self._last = max(self._last, step.max())
        self._make_room(value.shape[1:])
        column = (step // self._width).astype(np.intp)
        starts = np.concatenate([[0], np.flatnonzero(np.diff(column)) + 1])
        finite = np.isfinite(value)
        cells = tuple(map(slice, value.shape[1:]))
        totals = np.add.reduceat(np.where(finite, value, 0.0), starts)
        counts = np.add.reduceat(finite, starts, dtype=np.int32)
        for start, total, count in zip(starts, totals, counts, strict=True):
            self._total[(column[start], *cells)] += total
            self._count[(column[start], *cells)] += count

    def _make_room(self, shape: tuple[int, ...]) -> None:
        shape = tuple(map(max, shape, self._total.shape[1:]))
        limit = max(1, min(MAX_COLUMNS, MAX_CELLS // int(np.prod(shape))))
        while self._last // self._width >= limit:
            self._width *= 2
            self._total, self._count = _sum_of(self._total, 2), _sum_of(self._count, 2)
        if self._total.shape != (limit, *shape):
            self._total = _resized(self._total, (limit, *shape))
            self._count = _resized(self._count, (limit, *shape))

    def map(self) -> StepMap:
        spacing = (self._last - self._first) / max(1, self._rows - 1)
        # No narrower than the steps are apart, or there would be stripes between them.
        factor = max(1, int(np.ceil(spacing / self._width)))
        width = self._width * factor
        total, count = _sum_of(self._total, factor), _sum_of(self._count, factor)
        first, last = int(self._first // width), int(self._last // width) + 1
        total, count = total[first:last], count[first:last]
        mean = np.where(count, total / np.maximum(count, 1), np.nan)
        # A column lies around its steps.
        left, right = first * width - 0.5, last * width - 0.5
        return StepMap(np.moveaxis(mean, 0, -1).astype(np.float32), left, right)


def _sum_of(array: NDArray, columns: int) -> NDArray:
    """Every `columns` neighbours added up."""
    if columns == 1 or not len(array):
        return array
    return np.add.reduceat(array, np.arange(0, len(array), columns), dtype=array.dtype)


def _resized(array: NDArray, shape: tuple[int, ...]) -> NDArray:
    larger = np.zeros(shape, array.dtype)
    kept = tuple(slice(min(sizes)) for sizes in zip(array.shape, shape, strict=True))
    larger[kept] = array[kept]
    return larger
