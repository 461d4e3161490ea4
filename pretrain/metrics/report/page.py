"""report.html: one self-contained page that shows what runs did.

BokehJS is put into the page from Bokeh's own package, so that it opens without a network.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from pretrain.metrics.evaluation import read_evaluation
from pretrain.metrics.icl import read_icl
from pretrain.metrics.lm_eval import read_lm_eval
from pretrain.metrics.registry import METRICS
from pretrain.metrics.report.curves import by_position, by_shots
from pretrain.metrics.report.figures import HIGHEST_LOAD, Figures, embed, height_of
from pretrain.metrics.report.funnel import funnel_of
from pretrain.metrics.report.layout import Chart, DrawnSection, chart_columns, lay_out, step_range
from pretrain.metrics.report.reliability import attempts, events, lost_time
from pretrain.metrics.report.run import Run
from pretrain.metrics.report.summary import alarms, settings_of, status_of, summarize

HEADINGS = {
    "lost-time": "Where the time went",
    "events": "Events",
    "attempts": "Attempts",
    "funnel": "From the crawl to tokens",
    "long": "Answers in long contexts",
}


def render_page(runs: Sequence[Run], live: bool = False) -> str:
    """The page of one run, or of several side by side.

    Args:
        live: the page asks where it came from for what is new (live.js).
    """
    sections = lay_out(runs)
    charts = [chart for section in sections for chart in section.charts]
    references = _references(charts, runs)
    drawn = _draw(charts, references, runs)
    return TEMPLATES.get_template("page.html.jinja").render(
        title=" · ".join(run.name for run in runs),
        sections=sections,
        several=len(runs) > 1,
        fragments={name: Markup(html) for name, html in fragments(runs).items()},
        headings=HEADINGS,
        references=references,
        metrics=METRICS,
        drawn={name for run in runs for name in run.history.series},
        highest_load=HIGHEST_LOAD,
        page_js=Markup(_file("page.js")),
        live=live,
        made=datetime.now(UTC),
        **drawn,
    )


def fragments(runs: Sequence[Run]) -> dict[str, str]:
    """What changes on the page while runs go on, other than charts: {element id: inner HTML}."""
    several = len(runs) > 1
    evaluated = [(run.name, read_evaluation(run.directory)) for run in runs]
    long = [(name, found) for name, found in evaluated if found]
    shot_curves = [(run.name, by_shots(run)) for run in runs]
    scores = [(run.name, read(run.directory)) for run in runs for read in (read_icl, read_lm_eval)]
    contents: dict[str, dict[str, Any]] = {
        "status": {"status": f"{len(runs)} runs" if several else status_of(runs[0])},
        "alarms": {"alarms": list(alarms(runs))},
        "headline": summarize(runs),
        "lost-time": {"runs": lost_time(runs)},
        "events": {"events": events(runs)},
        "attempts": {"attempts": attempts(runs)},
        "funnel": funnel_of(runs),
        "long": {"long": long, "position_curves": by_position(long)},
        "evaluations": {
            "tables": [(name, found) for name, found in scores if found],
            "shot_curves": [(name, curves) for name, curves in shot_curves if curves],
        },
        "settings": settings_of(runs),
    }
    return {
        name: TEMPLATES.get_template(f"fragments/{name}.jinja")
        .render(several=several, **content)
        .strip()
        for name, content in contents.items()
    }


def _draw(
    charts: Sequence[Chart], references: Mapping[str, Any], runs: Sequence[Run]
) -> dict[str, Any]:
    if not charts:
        return {}
    figures = Figures(*step_range(runs), chart_columns(runs))
    drawn = [figures.draw(chart, references.get(chart.name, ())) for chart in charts]
    script, elements = embed(drawn)
    names = [chart.name for chart in charts]
    return {
        "elements": dict(zip(names, map(Markup, elements), strict=True)),
        "heights": {chart.name: height_of(chart) for chart in charts},
        "bokeh": Markup(BOKEH_JS.render_js()),
        "script": Markup(script),
    }


def _references(charts: Sequence[Chart], runs: Sequence[Run]) -> dict[str, list[tuple[str, float]]]:
    """Values that a chart is compared with, by its name; they hold for a single run."""
    if len(runs) > 1:
        return {}
    config = runs[0].config
    values = {
        "train/loss": ("unigram entropy", runs[0].unigram_entropy),
        "train/grad_norm": ("clipped to", config.optim.clip if config else None),
    }
    names = {chart.name for chart in charts}
    return {
        name: [(label, value)]
        for name, (label, value) in values.items()
        if value is not None and name in names
    }


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


def _is_shown(section: DrawnSection, rendered: Mapping[str, str]) -> bool:
    return bool(section.charts) or any(rendered[name] for name in section.fragments)


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


BOKEH_JS = Resources(mode="inline", components=["bokeh"])
TEMPLATES = Environment(
    loader=PackageLoader("pretrain.metrics", "report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["slug"] = _slug
TEMPLATES.filters["is_shown"] = _is_shown
