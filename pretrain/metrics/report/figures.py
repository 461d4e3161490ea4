"""The report's charts as Bokeh figures that share the step axis.

Axes, grid and text take their colours from the page's style sheet (its `--bk-*` properties), so
that they follow its light and dark scheme. What is alive in them is in page.js: the smoothed
lines, the range of values, logarithmic scales, and the numbers under the pointer.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.events import DocumentReady
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    CustomJS,
    CustomJSHover,
    CustomJSTickFormatter,
    FixedTicker,
    GlyphRenderer,
    HoverTool,
    LinearColorMapper,
    LinearScale,
    LogAxis,
    LogScale,
    NumeralTickFormatter,
    Range1d,
    Span,
)
from bokeh.plotting import figure

from pretrain.metrics.history import LEVELS_PER_UNIT, NO_DATA
from pretrain.metrics.report.layout import Chart, Columns, HeatMap, Line
from pretrain.metrics.report.panels import Lines

BLUE, ORANGE, GREY, ALARM = "#3d7edb", "#d0662a", "#7d858f", "#d04a35"
FONT = "system-ui, sans-serif"
# So that the charts below each other have their values on one vertical line.
LEFT_BORDER = 58
HIGHEST_LOAD = 3
TICKS_OF_ROWS = 9
NOTHING: Columns = {"step": [], "value": []}
STARTS = "farspan.start(figures, scales)"


class Figures:
    """Makes the figures of a page; they zoom together and share one pointer line."""

    def __init__(self, first: float, last: float, columns: Mapping[str, Columns]) -> None:
        self._columns = columns
        self._steps = Range1d(
            first, last, bounds=(first, last), min_interval=(last - first) / 1000, name="steps"
        )
        self._pointer = Span(dimension="height", line_color=GREY, line_alpha=0.6)
        self._sources: dict[str, ColumnDataSource] = {}

    def draw(self, chart: Chart, references: Sequence[tuple[str, float]] = ()) -> figure:
        """Dragging zooms the step axis, a double click shows all of it (page.js)."""
        if chart.maps:
            return self._map_figure(chart)
        return self._line_figure(chart, references)

    def _empty(self, chart: Chart) -> figure:
        drawn = figure(
            name=chart.name,
            x_range=self._steps,
            y_range=Range1d(0, 1),
            height=height_of(chart),
            sizing_mode="stretch_width",
            toolbar_location=None,
            tools=[BoxZoomTool(dimensions="width"), CrosshairTool(overlay=self._pointer)],
            active_drag=None,
            min_border=0,
            min_border_left=LEFT_BORDER,
            min_border_right=12,
            background_fill_color=None,
            border_fill_color=None,
            outline_line_color=None,
            lod_threshold=None,
        )
        drawn.xaxis.formatter = NumeralTickFormatter(format="0,0")
        drawn.xaxis.ticker.desired_num_ticks = 5
        drawn.xgrid.visible = False
        _style_axes(drawn)
        return drawn

    def _line_figure(self, chart: Chart, references: Sequence[tuple[str, float]]) -> figure:
        assert isinstance(chart.panel, Lines)
        drawn = self._empty(chart)
        drawn.y_range = Range1d(*_values_of(chart, chart.panel))
        drawn.add_layout(LogAxis(visible=False), "left")
        ticks = CustomJSTickFormatter(args={"unit": chart.unit}, code=TICK)
        for axis in drawn.left:
            axis.formatter = ticks
        for axis, ticks in zip(drawn.left, (5, 5), strict=True):
            axis.ticker.desired_num_ticks = ticks
        _style_axes(drawn)
        for line in chart.lines:
            self._add_line(drawn, line, chart.panel)
        for _, value in references:
            drawn.hspan(y=[value], line_color=GREY, line_dash=[5, 4], level="underlay")
        means = [
            self._source(f"{line.source}:mean")
            for line in chart.lines
            if f"{line.source}:mean" in self._columns
        ]
        from_zero = chart.panel.from_zero
        drawn.tags = [{"unit": chart.unit, "from_zero": from_zero, "means": means}]
        return drawn

    def _add_line(self, drawn: figure, line: Line, panel: Lines) -> None:
        style = {"color": line.color, "line_dash": list(line.dash), "line_join": "round"}
        raw = self._source(line.source)
        drawn.line("step", "value", source=raw, line_width=1.5, name="raw", **style)
        if panel.is_noisy:
            smooth = ColumnDataSource(dict(NOTHING), name=f"{line.source}:smooth")
            drawn.line("step", "value", source=smooth, line_width=2, name="smooth", **style)
        gaps = f"{line.source}:gaps"
        if gaps in self._columns:
            drawn.scatter(
                "step",
                "value",
                source=self._source(gaps),
                marker="x",
                size=9,
                line_width=2,
                color=ALARM,
                name="gaps",
            )

    def _map_figure(self, chart: Chart) -> figure:
        rows = chart.maps[0].rows
        drawn = self._empty(chart)
        drawn.y_range = Range1d(-0.5, len(rows) - 0.5)
        drawn.ygrid.visible = False
        step = -(-len(rows) // TICKS_OF_ROWS)
        drawn.yaxis.ticker = FixedTicker(ticks=list(range(0, len(rows), step)))
        drawn.yaxis.formatter = CustomJSTickFormatter(
            args={"rows": [_short_row(row) for row in rows]}, code="return rows[tick]"
        )
        drawn.tags = [{"unit": chart.unit, "map": chart.maps[0].scale}]
        images = [self._add_map(drawn, heat_map) for heat_map in chart.maps]
        for image in images[1:]:
            image.visible = False
        drawn.add_tools(self._hover(chart, images))
        return drawn

    def _add_map(self, drawn: figure, heat_map: HeatMap) -> GlyphRenderer:
        return drawn.image(
            image="image",
            x="x",
            y="y",
            dw="dw",
            dh="dh",
            source=self._source(heat_map.source),
            color_mapper=self._load_colors if heat_map.scale == "load" else self._log_colors,
        )

    def _hover(self, chart: Chart, images: list[GlyphRenderer]) -> HoverTool:
        """Maps that share a figure have the same rows and the same scale."""
        first = chart.maps[0]
        value = CustomJSHover(
            args={"source": images[0].data_source, "unit": chart.unit, "scale": first.scale},
            code=LEVEL,
        )
        row = CustomJSHover(args={"rows": list(first.rows)}, code=ROW)
        told = "of its share" if first.scale == "load" else "mean"
        return HoverTool(
            renderers=images,
            tooltips=_tooltip({"step": "$x{0,0}", "row": "$y{custom}", told: "@image{custom}"}),
            formatters={"@image": value, "$y": row},
            show_arrow=False,
        )

    def _source(self, name: str) -> ColumnDataSource:
        if name not in self._sources:
            self._sources[name] = ColumnDataSource(dict(self._columns[name]), name=name)
        return self._sources[name]

    @cached_property
    def _load_colors(self) -> LinearColorMapper:
        return _mapper(_load_palette())

    @cached_property
    def _log_colors(self) -> LinearColorMapper:
        levels = range(NO_DATA)
        alphas = [round(8 + 247 * (level / (NO_DATA - 1)) ** 1.2) for level in levels]
        return _mapper([f"{BLUE}{alpha:02x}" for alpha in alphas])


def _values_of(chart: Chart, panel: Lines) -> tuple[float, float]:
    """The range of values, with room; page.js keeps to what is in sight.

    Without it the first picture is drawn on another axis, and what lay on its edge stays there.
    """
    values = np.concatenate([line.series.value for line in chart.lines])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    is_on_zero = panel.from_zero and low >= 0
    low = 0.0 if is_on_zero else low
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - (0 if is_on_zero else room), high + room


def height_of(chart: Chart) -> int:
    """In pixels, with the axis."""
    if chart.maps:
        rows = len(chart.maps[0].rows)
        return min(300, 50 + max(7, 220 // rows) * rows)
    return 300 if isinstance(chart.panel, Lines) and chart.panel.is_wide else 170


def embed(figures: Sequence[figure]) -> tuple[str, list[str]]:
    """The script that draws the figures, and the element that each of them fills."""
    document = Document()
    with document.models.freeze():
        for drawn in figures:
            document.add_root(drawn)
    args = {"figures": list(figures), "scales": {"linear": LinearScale(), "log": LogScale()}}
    document.js_on_event(DocumentReady, CustomJS(args=args, code=STARTS))
    script, elements = components(list(figures))
    return script, list(elements)


TICK = "return farspan.format(tick, unit)"
ROW = "return rows[Math.round(value)] ?? ''"
LEVEL = f"""
if (value == {NO_DATA}) return "none"
if (scale == "load") return (value / {LEVELS_PER_UNIT}).toFixed(2)
const [low, high] = [source.data.low[0], source.data.high[0]]
return farspan.format(low * (high / low) ** (value / {NO_DATA - 1}), unit)
"""


def _style_axes(drawn: figure) -> None:
    for axis in [*drawn.below, *drawn.left]:
        axis.update(
            major_label_text_font=FONT,
            major_label_text_font_size="11px",
            minor_tick_line_color=None,
            major_tick_in=0,
            major_tick_out=4,
        )
    for axis in drawn.left:
        # The page's colours win over a colour set here, None included.
        axis.axis_line_alpha = 0
        axis.major_tick_line_alpha = 0


def _short_row(row: str) -> str:
    """What fits beside a heat map."""
    if row in ("embedding", "output"):
        return row[:3]
    return row.removeprefix("expert ").removeprefix("layer ").partition(" to ")[0]


def _mapper(palette: list[str]) -> LinearColorMapper:
    """A colour for each level, and none where there is no data."""
    return LinearColorMapper(
        palette=[*palette, "#00000000"], low=-0.5, high=NO_DATA + 0.5, nan_color=(0, 0, 0, 0)
    )


def _load_palette() -> list[str]:
    """Blue below the balanced load, clear at it, orange above."""
    palette = []
    for level in range(NO_DATA):
        excess = level / LEVELS_PER_UNIT - 1
        strength = -excess if excess < 0 else min(1, excess / (HIGHEST_LOAD - 1))
        palette.append(f"{BLUE if excess < 0 else ORANGE}{round(255 * strength**0.7):02x}")
    return palette


def _tooltip(fields: dict[str, str]) -> str:
    row = (
        '<div style="display: flex; gap: 16px; justify-content: space-between">'
        '<span style="opacity: 0.65">{}</span><span>{}</span></div>'
    )
    return "".join(row.format(label, field) for label, field in fields.items())
