"""The report's charts: Bokeh figures that share the step axis and the page's colours.

Axes, grid and text take their colours from the page's style sheet (its `--bk-*` properties), so
that they follow its light and dark scheme. The colours below are legible on both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.events import DocumentReady, DoubleTap
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    CrosshairTool,
    CustomJS,
    CustomJSHover,
    GlyphRenderer,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    PrintfTickFormatter,
    Range1d,
    Span,
)
from bokeh.plotting import figure

from pretrain.metrics.history import (
    LEVELS_PER_UNIT,
    NO_DATA,
    History,
    LoadHistory,
    Series,
    smooth,
    thin,
)
from pretrain.metrics.registry import METRICS

BLUE, ORANGE, GREY = "#4080dc", "#db702c", "#8a919c"
FONT = "system-ui, sans-serif"
MAX_POINTS = 3000
HIGHEST_LOAD = 3

# On a touch screen dragging scrolls the page; it zooms only where there is a mouse. The box that
# zooms the steps fixes the range of values as well, which is undone once it has done so.
ON_READY = """
const has_mouse = matchMedia("(pointer: fine)").matches
for (const { toolbar } of figures) toolbar.tools[0].active = has_mouse
const fit_values = () => { for (const { y_range } of figures) y_range.reset() }
const { start, end } = figures[0].x_range.properties
for (const bound of [start, end]) bound.change.connect(() => setTimeout(fit_values))
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const figure of figures) Bokeh.index.find_one(figure)?.request_paint()
})
"""


@dataclass(frozen=True)
class Key:
    """One entry of a chart's legend; `style` is line, faint, dashed or dot."""

    label: str
    color: str
    style: str


@dataclass(frozen=True)
class Chart:
    """A figure and what the page says about it."""

    title: str
    unit: str
    help: str
    keys: tuple[Key, ...]
    figure: figure


class StepAxis:
    """The horizontal axis of all charts: they zoom together and share one pointer line."""

    def __init__(self, history: History) -> None:
        steps = history.series["train/step"].value
        first, last = float(steps[0]), float(steps[-1])
        # Room for a single step, and for the dot at the last one.
        last += max(1.0, (last - first) / 100)
        self.first, self.last = first, last
        self.range = Range1d(first, last, bounds=(first, last), min_interval=(last - first) / 1000)
        self.pointer = Span(dimension="height", line_color=GREY)

    def figure(self, height: int) -> figure:
        """An empty chart; dragging zooms the step axis, a double click shows all of it."""
        chart = figure(
            x_range=self.range,
            window_axis="x",
            height=height,
            sizing_mode="stretch_width",
            toolbar_location=None,
            tools=[BoxZoomTool(dimensions="width"), CrosshairTool(overlay=self.pointer)],
            active_drag=None,
            min_border=0,
            background_fill_color=None,
            border_fill_color=None,
            outline_line_color=None,
        )
        for axis in chart.axis:
            axis.update(
                major_label_text_font=FONT,
                major_label_text_font_size="11px",
                minor_tick_line_color=None,
                major_tick_in=0,
                major_tick_out=4,
            )
        chart.xaxis.formatter = NumeralTickFormatter(format="0,0")
        chart.yaxis.formatter = PrintfTickFormatter(format="%.5g")
        # The page's colours win over a colour set here, None included.
        chart.yaxis.axis_line_alpha = 0
        chart.yaxis.major_tick_line_alpha = 0
        chart.xgrid.visible = False
        reset = "steps.start = first; steps.end = last"
        bounds = {"steps": self.range, "first": self.first, "last": self.last}
        chart.js_on_event(DoubleTap, CustomJS(args=bounds, code=reset))
        return chart


class Line(NamedTuple):
    """How one metric is drawn; `hover` is a printf format."""

    metric: str
    title: str
    hover: str
    from_zero: bool = False


LINES = (
    Line("train/lr", "Learning rate", "%.3e"),
    Line("train/seq_len", "Tokens per sequence", "%d", from_zero=True),
    Line("train/grad_norm", "Gradient norm", "%.4f", from_zero=True),
    Line("perf/tokens_per_s", "Throughput", "%.0f", from_zero=True),
    Line("perf/data_wait_s", "Waiting for data", "%.4f", from_zero=True),
    Line("train/aux_loss", "Balance loss", "%.5f"),
    Line("moe/max_violation", "Busiest expert", "%.3f", from_zero=True),
)


def training_charts(
    axis: StepAxis, history: History, unigram_entropy: float | None, clip: float | None
) -> list[Chart]:
    """The loss and each metric of LINES that the run logged.

    Args:
        unigram_entropy: in nats per token, a reference for the loss.
        clip: the gradient norm that larger ones are scaled down to.
    """
    charts = []
    if "train/loss" in history.series:
        charts.append(_loss_chart(axis, history, unigram_entropy))
    for line in LINES:
        if line.metric in history.series:
            at = clip if line.metric == "train/grad_norm" else None
            charts.append(_line_chart(axis, history.series[line.metric], line, at))
    return charts


def _loss_chart(axis: StepAxis, history: History, unigram_entropy: float | None) -> Chart:
    loss = history.series["train/loss"]
    chart = axis.figure(320)
    rows = max(5, len(loss.value) // 50)
    source = _source(loss, mean=smooth(loss.value, rows))
    raw = chart.line("step", "value", source=source, color=BLUE, line_alpha=0.4)
    chart.line("step", "mean", source=source, color=BLUE, line_width=2)
    chart.add_tools(_hover(raw, {"loss": "@value{%.4f}", "mean": "@mean{%.4f}"}))
    keys = [Key("raw", BLUE, "faint"), Key(f"mean of about {rows} rows", BLUE, "line")]
    if unigram_entropy is not None:
        keys.append(_add_reference(chart, "unigram entropy", unigram_entropy))
    return _chart("Loss", "train/loss", keys, chart)


def _line_chart(axis: StepAxis, series: Series, line: Line, clip: float | None) -> Chart:
    chart = axis.figure(190)
    if line.from_zero:
        chart.y_range.start = 0
    drawn = chart.line("step", "value", source=_source(series), color=BLUE, line_width=1.5)
    chart.add_tools(_hover(drawn, {line.title.lower(): f"@value{{{line.hover}}}"}))
    keys = [] if clip is None else [_add_reference(chart, "clipped to", clip)]
    return _chart(line.title, line.metric, keys, chart)


def load_charts(axis: StepAxis, load: LoadHistory) -> list[Chart]:
    """One heat map per layer: steps across, experts up, colour for the load."""
    layers, experts, _ = load.level.shape
    hover = CustomJSHover(code=f"return (value / {LEVELS_PER_UNIT}).toFixed(2)")
    colors = LinearColorMapper(
        palette=_load_palette(), low=-0.5, high=NO_DATA + 0.5, nan_color=(0, 0, 0, 0)
    )
    charts = []
    for layer in range(layers):
        chart = axis.figure(min(260, 60 + 10 * experts))
        chart.y_range = Range1d(-0.5, experts - 0.5)
        chart.yaxis.ticker.min_interval = 1
        chart.ygrid.visible = False
        image = chart.image(
            image=[load.level[layer]],
            x=load.first_step,
            y=-0.5,
            dw=load.last_step - load.first_step,
            dh=experts,
            color_mapper=colors,
        )
        chart.add_tools(
            HoverTool(
                renderers=[image],
                tooltips=_tooltip(
                    {"step": "$x{0,0}", "expert": "$y{0}", "of its share": "@image{custom}"}
                ),
                formatters={"@image": hover},
                show_arrow=False,
            )
        )
        charts.append(Chart(f"Layer {layer + 1}", "", "", (), chart))
    return charts


def embed_charts(charts: Sequence[Chart]) -> tuple[str, list[str]]:
    """The script that draws the charts, and the element that each of them fills."""
    document = Document()
    figures = [chart.figure for chart in charts]
    with document.models.freeze():
        for figure in figures:
            document.add_root(figure)
    document.js_on_event(DocumentReady, CustomJS(args={"figures": figures}, code=ON_READY))
    script, elements = components(figures)
    return script, list(elements)


def _load_palette() -> list[str]:
    """A colour for each level: blue below the balanced load, clear at it, orange above."""
    palette = []
    for level in range(NO_DATA):
        excess = level / LEVELS_PER_UNIT - 1
        strength = -excess if excess < 0 else min(1, excess / (HIGHEST_LOAD - 1))
        alpha = round(255 * strength**0.7)
        palette.append(f"{BLUE if excess < 0 else ORANGE}{alpha:02x}")
    return [*palette, "#00000000"]


def _chart(title: str, metric: str, keys: Sequence[Key], chart: figure) -> Chart:
    return Chart(title, METRICS[metric].unit, METRICS[metric].help, tuple(keys), chart)


def _source(series: Series, **more: np.ndarray) -> ColumnDataSource:
    """The points to draw, as typed arrays; values that are not finite become gaps."""
    value = np.where(np.isfinite(series.value), series.value, np.nan)
    index = thin(value, MAX_POINTS)
    columns = {"step": series.step, "value": value, **more}
    return ColumnDataSource({name: column[index] for name, column in columns.items()})


def _hover(renderer: GlyphRenderer, values: dict[str, str]) -> HoverTool:
    return HoverTool(
        renderers=[renderer],
        tooltips=_tooltip({"step": "@step{0,0}", **values}),
        formatters={field.partition("{")[0]: "printf" for field in values.values()},
        mode="vline",
        show_arrow=False,
    )


def _tooltip(fields: dict[str, str]) -> str:
    row = (
        '<div style="display: flex; gap: 16px; justify-content: space-between">'
        '<span style="opacity: 0.65">{}</span><span>{}</span></div>'
    )
    return "".join(row.format(label, field) for label, field in fields.items())


def _add_reference(chart: figure, label: str, value: float) -> Key:
    """A dashed line that does not stretch the range of values."""
    chart.add_layout(Span(dimension="width", location=value, line_color=GREY, line_dash=[5, 4]))
    return Key(f"{label} {value:.4g}", GREY, "dashed")
