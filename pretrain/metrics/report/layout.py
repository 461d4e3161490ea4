"""Which charts the runs of a page have, what each of them draws, and in which colours.

Nothing here knows of Bokeh: it is what a page that follows a run asks for every few seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.metrics.downsample import Series, StepMap
from pretrain.metrics.history import LEVELS_PER_UNIT, NO_DATA, History
from pretrain.metrics.registry import METRICS
from pretrain.metrics.report.panels import SECTIONS, STEP, Lines, Loads, Map, Panel
from pretrain.metrics.report.run import Run

# Each has a contrast of 3 and more with white and with the dark page.
COLORS = ("#3d7edb", "#d0662a", "#2d9a6b", "#9a68d8", "#cc5a86", "#1f93a8", "#94851c", "#7d858f")
MOST_LAYERS_SHOWN = 6
DASHES = ((), (6, 3), (2, 2), (8, 3, 2, 3))

Columns = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        source: names its columns `step` and `value`.
        label: what the legend calls it; empty if it is the only one.
    """

    source: str
    label: str
    color: str
    dash: tuple[int, ...]
    series: Series


@dataclass(frozen=True)
class HeatMap:
    """One heat map: its rows are labelled from the bottom upwards.

    Attributes:
        source: names its columns `image`, `x`, `y`, `dw`, `dh`, `low` and `high`.
        scale: how a level of the image becomes a value: `load`, or `log` between low and high.
    """

    source: str
    rows: tuple[str, ...]
    scale: str
    columns: Columns


@dataclass(frozen=True)
class Chart:
    """What one figure shows; it has lines, or maps of which one is seen at a time.

    Attributes:
        note: what of the title's metric it shows.
    """

    name: str
    title: str
    note: str
    unit: str
    metrics: tuple[str, ...]
    panel: Panel
    lines: tuple[Line, ...] = ()
    maps: tuple[HeatMap, ...] = ()


@dataclass(frozen=True)
class DrawnSection:
    """
    Attributes:
        charts: of the metrics that any of the runs has logged.
        fragments: as those of `Section`.
    """

    title: str
    charts: tuple[Chart, ...]
    fragments: tuple[str, ...]


def lay_out(runs: Sequence[Run]) -> list[DrawnSection]:
    """All sections, those without charts as well."""
    sections = [
        DrawnSection(
            section.title,
            tuple(chart for panel in section.panels for chart in _charts(panel, runs)),
            tuple(section.fragments),
        )
        for section in SECTIONS
    ]
    unknown = DrawnSection("Other metrics", tuple(_unknown_charts(runs)), ())
    return [*sections[:-1], unknown, sections[-1]]


def step_range(runs: Sequence[Run]) -> tuple[float, float]:
    """The steps that charts span: all that any of the runs has logged."""
    steps = [run.history.series[STEP].step for run in runs if STEP in run.history.series]
    if not steps:
        return 0.0, 1.0
    first, last = min(float(step[0]) for step in steps), max(float(step[-1]) for step in steps)
    # Room for a single step, and for what is marked at the last one.
    return first, last + max(1.0, (last - first) / 100)


def chart_columns(runs: Sequence[Run]) -> dict[str, Columns]:
    """What the charts are drawn from, by the names of their sources.

    `NAME` holds the points of a line, `NAME:mean` what it is smoothed from where that is not the
    same, `NAME:gaps` where it is broken as a value is not finite.
    """
    columns: dict[str, Columns] = {}
    for section in lay_out(runs):
        for chart in section.charts:
            for line in chart.lines:
                columns.update(_line_columns(line))
            for heat_map in chart.maps:
                columns[heat_map.source] = heat_map.columns
    return columns


def _charts(panel: Panel, runs: Sequence[Run]) -> Iterator[Chart]:
    if isinstance(panel, Lines):
        if lines := _lines(panel.metrics, runs):
            yield _chart(panel, lines=lines)
    elif isinstance(panel, Map):
        for run in runs:
            if (step_map := run.history.maps.get(panel.metric)) is not None:
                note = run.name if len(runs) > 1 else ""
                yield _chart(panel, run, note, maps=(_map(panel, run, step_map),))
    else:
        for run in runs:
            yield from _load_charts(panel, run, several=len(runs) > 1)


def _chart(
    panel: Panel,
    run: Run | None = None,
    note: str = "",
    lines: tuple[Line, ...] = (),
    maps: tuple[HeatMap, ...] = (),
) -> Chart:
    metrics = panel.metrics if isinstance(panel, Lines) else (panel.metric,)
    known = [metric for metric in metrics if metric in METRICS]
    unit = METRICS[known[0]].unit if known else "1"
    name = "|".join([metrics[0], *([run.name] if run else []), *([note] if note else [])])
    return Chart(name, panel.title, note, unit, metrics, panel, lines, maps)


def _lines(metrics: Sequence[str], runs: Sequence[Run]) -> tuple[Line, ...]:
    """Of one run each line has its colour; of several, each run has, and each line its dashes."""
    found = [
        (number, run, metric, key, series)
        for number, run in enumerate(runs)
        for metric in metrics
        for key, series in _series_of(run.history, metric)
    ]
    kinds = list(dict.fromkeys((metric, key) for _, _, metric, key, _ in found))
    lines = []
    for number, run, metric, key, series in found:
        kind = kinds.index((metric, key))
        color, dash = (number, kind) if len(runs) > 1 else (kind, kind // len(COLORS))
        label = key or (_short(metric) if len(metrics) > 1 else "")
        names = [run.name] * (len(runs) > 1) + [label] * bool(label)
        lines.append(
            Line(
                f"{metric}{key and '/'}{key}|{run.name}",
                " · ".join(names),
                COLORS[color % len(COLORS)],
                DASHES[dash % len(DASHES)],
                series,
            )
        )
    return tuple(lines)


def _series_of(history: History, metric: str) -> list[tuple[str, Series]]:
    if metric in history.series:
        return [("", history.series[metric])]
    return sorted(history.parts(metric).items())


def _short(metric: str) -> str:
    name = metric.rpartition("/")[2].removesuffix("_s").replace("_", " ")
    return {"mfu": "model (MFU)", "hfu": "hardware (HFU)", "ettr": "ETTR"}.get(name, name)


def _unknown_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Of metrics of another version, each under its name."""
    names = dict.fromkeys(name for run in runs for name in run.history.series)
    for name in names:
        if name != STEP and not _is_drawn(name):
            yield _chart(Lines(name, (name,)), lines=_lines((name,), runs))


def _is_drawn(name: str) -> bool:
    """Whether a panel draws it: itself, or as a part of a metric."""
    return any(name == metric or name.startswith(f"{metric}/") for metric in DRAWN)


DRAWN = frozenset(
    metric
    for section in SECTIONS
    for panel in section.panels
    for metric in (panel.metrics if isinstance(panel, Lines) else (panel.metric,))
)


def _line_columns(line: Line) -> Iterator[tuple[str, Columns]]:
    series = line.series
    yield line.source, _points(series.step, series.value)
    if len(series.mean) != len(series.value):
        yield f"{line.source}:mean", _points(series.mean_step, series.mean)
    gaps = np.flatnonzero(~np.isfinite(series.value))
    if len(gaps):
        yield f"{line.source}:gaps", _points(series.step[gaps], _value_before(series, gaps))


def _points(step: NDArray[np.float64], value: NDArray[np.float64]) -> Columns:
    """With seven digits: more than a chart shows, in half the bytes."""
    finite = np.where(np.isfinite(value), value, np.nan)
    return {"step": step.astype(np.float32), "value": finite.astype(np.float32)}


def _value_before(series: Series, gaps: NDArray[np.intp]) -> NDArray[np.float64]:
    """Where a gap is marked: at the last value that is finite, or else the first one."""
    finite = np.flatnonzero(np.isfinite(series.value))
    if not len(finite):
        return np.zeros(len(gaps))
    before = np.searchsorted(finite, gaps) - 1
    return series.value[finite[np.maximum(before, 0)]]


def _map(panel: Map, run: Run, step_map: StepMap) -> HeatMap:
    mean = step_map.mean.reshape(-1, step_map.mean.shape[-1])
    image, low, high = _log_levels(mean)
    rows = _positions(len(mean)) if panel.rows == "positions" else _layers(len(mean))
    extent = _extent(step_map.first_step, step_map.last_step, len(mean))
    columns = {"image": [image], **extent, "low": [low], "high": [high]}
    return HeatMap(f"{panel.metric}|{run.name}", rows, "log", columns)


def _log_levels(mean: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float, float]:
    """Levels 0 to NO_DATA - 1 on a logarithmic scale between two values; NO_DATA where none is.

    The scale spans the middle 98 % of the values of the later half: a single spike, or how all
    begins, would take all of it.
    """
    later = mean[:, mean.shape[1] // 2 :]
    shown = later[np.isfinite(later) & (later > 0)]
    if not len(shown):
        return np.full(mean.shape, NO_DATA, np.uint8), 1.0, 1.0
    low, high = np.quantile(shown, [0.01, 0.99]).astype(float)
    span = max(np.log(high / low), 1e-9)
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.log(mean / low) / span * (NO_DATA - 1)
    level = np.where(np.isfinite(mean), np.round(level).clip(0, NO_DATA - 1), NO_DATA)
    return level.astype(np.uint8), low, high


def _layers(rows: int) -> tuple[str, ...]:
    return ("embedding", *(f"layer {layer}" for layer in range(1, rows - 1)), "output")[:rows]


def _positions(rows: int) -> tuple[str, ...]:
    """Bucket n holds the tokens that have 2^n to 2^(n+1) - 1 others before them."""
    return tuple(f"{2**n:,} to {2 ** (n + 1) - 1:,}" if n else "1" for n in range(rows))


def _load_charts(panel: Loads, run: Run, several: bool) -> Iterator[Chart]:
    """A chart for each layer; of many layers, an overview, and one in which they are chosen."""
    load = run.history.load
    if load is None:
        return
    layers, experts, _ = load.level.shape
    extent = _extent(load.first_step, load.last_step, experts)
    scale = {"low": [0.0], "high": [NO_DATA / LEVELS_PER_UNIT]}
    rows = tuple(f"expert {expert}" for expert in range(experts))
    maps = [
        HeatMap(
            f"{panel.metric}:{layer}|{run.name}",
            rows,
            "load",
            {"image": [level], **extent, **scale},
        )
        for layer, level in enumerate(load.level, start=1)
    ]
    note = run.name if several else ""
    if layers <= MOST_LAYERS_SHOWN and not several:
        for layer, heat_map in enumerate(maps, start=1):
            yield _chart(panel, run, f"layer {layer}", maps=(heat_map,))
        return
    # Of an unsigned level the largest may be the mark of no data.
    busiest = np.where(load.level == NO_DATA, 0, load.level).max(1)
    busiest[(load.level == NO_DATA).all(1)] = NO_DATA
    overview = HeatMap(
        f"{panel.metric}:busiest|{run.name}",
        tuple(f"layer {layer}" for layer in range(1, layers + 1)),
        "load",
        {"image": [busiest], **_extent(load.first_step, load.last_step, layers), **scale},
    )
    busiest_note = " · ".join(filter(None, [note, "busiest expert of each layer"]))
    yield _chart(panel, run, busiest_note, maps=(overview,))
    yield _chart(panel, run, note, maps=tuple(maps))


def _extent(first: float, last: float, rows: int) -> Columns:
    return {"x": [first], "y": [-0.5], "dw": [last - first], "dh": [float(rows)]}
