"""report.html: one self-contained page that shows what a run did.

BokehJS is put into the page from Bokeh's own package, so that it opens without a network.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from pretrain.config import Config, parse_config
from pretrain.metrics.charts import (
    HIGHEST_LOAD,
    StepAxis,
    embed_charts,
    load_charts,
    training_charts,
)
from pretrain.metrics.evaluation import read_evaluation
from pretrain.metrics.history import History, read_history
from pretrain.model.config import ModelConfig
from pretrain.run_dir import RunDirectory, write_atomically

LOG_TAIL_BYTES = 4096
BOKEH_JS = Resources(mode="inline", components=["bokeh"])
TEMPLATES = Environment(
    loader=PackageLoader("pretrain", "metrics"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(run: RunDirectory, data_manifests: Sequence[dict[str, Any]] = ()) -> Path:
    """Write the run's report.html from what lies in its directory, and return its path.

    Args:
        data_manifests: of the data the run trains on. `unigram_entropy` (nats per token) and
            `funnel`, a list of `{"stage", "reason", "documents"}`, are shown where there.
    """
    history = read_history(run.metrics)
    config = parse_config(yaml.safe_load(run.config.read_text())) if run.config.exists() else None
    unigram_entropy = _unigram_entropy(data_manifests)
    page = TEMPLATES.get_template("report.html.jinja").render(
        name=run.root.resolve().name,
        status=_status(run, history),
        alarms=list(_alarms(history)),
        headline=list(_headline(history, config, unigram_entropy)),
        **_drawn_charts(history, config, unigram_entropy),
        evaluation=read_evaluation(run),
        funnel=_funnel(data_manifests),
        attempts=list(_attempts(run)),
        settings=_settings(config.model_dump(mode="json")) if config else {},
        made=datetime.now(UTC),
    )
    write_atomically(run.report, page)
    return run.report


def _drawn_charts(
    history: History, config: Config | None, unigram_entropy: float | None
) -> dict[str, Any]:
    if not history.rows:
        return {}
    axis = StepAxis(history)
    clip = config.optim.clip if config else None
    training = training_charts(axis, history, unigram_entropy, clip)
    charts = [*training, *(load_charts(axis, history.load) if history.load else [])]
    if not charts:
        return {}
    script, elements = embed_charts(charts)
    drawn = list(zip(charts, map(Markup, elements), strict=True))
    return {
        "training_charts": drawn[: len(training)],
        "load_charts": drawn[len(training) :],
        "highest_load": HIGHEST_LOAD,
        "scripts": Markup(BOKEH_JS.render_js() + script),
    }


def _status(run: RunDirectory, history: History) -> str:
    if not history.rows:
        return "No metrics were logged yet."
    if run.done.exists():
        return "Finished."
    return "Not finished: it is running, or it was stopped."


def _alarms(history: History) -> Iterator[str]:
    for name, series in history.series.items():
        steps = series.non_finite_steps()
        if steps:
            shown = ", ".join(f"{step:,}" for step in steps[:10])
            more = f" and {len(steps) - 10:,} more" if len(steps) > 10 else ""
            where = "step" if len(steps) == 1 else "steps"
            yield f"{name} is not finite at {where} {shown}{more}; the charts have gaps there."


class Number(NamedTuple):
    """One number of the page's headline."""

    label: str
    value: str
    detail: str


def _headline(
    history: History, config: Config | None, unigram_entropy: float | None
) -> Iterator[Number]:
    if (step := history.last("train/step")) is not None:
        yield Number("Steps", f"{step:,.0f}", f"of {config.train.steps:,}" if config else "")
    if (tokens := history.last("train/tokens")) is not None:
        yield Number("Tokens", _compact(tokens), "trained on")
    if (loss := history.last("train/loss")) is not None:
        detail = "nats per token"
        if unigram_entropy is not None:
            detail = f"nats per token; unigram entropy {unigram_entropy:.3f}"
        yield Number("Loss", f"{loss:.4f}", detail)
    if (throughput := history.series.get("perf/tokens_per_s")) is not None:
        yield Number("Throughput", _compact(float(np.median(throughput.value))), "tokens/s, median")
    if config is not None:
        total, active = _parameters(config.model)
        yield Number("Model", _compact(total), f"parameters, {_compact(active)} active per token")


def _parameters(model: ModelConfig) -> tuple[int, int]:
    """How many parameters the model has, and how many of them work on one token."""
    import torch

    from pretrain.model.transformer import Transformer

    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Transformer(model).named_parameters()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    n_experts, top_k = model.moe.n_experts, model.moe.top_k
    idle = experts * (n_experts - top_k) // n_experts if n_experts else 0
    return total, total - idle


def _compact(number: float) -> str:
    """Three significant digits with a unit: 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = number / size
            return f"{digits:.{2 if digits < 10 else 1 if digits < 100 else 0}f}{unit}"
    return f"{number:.0f}"


def _unigram_entropy(manifests: Sequence[dict[str, Any]]) -> float | None:
    """That of the data, if it is a single source: those of several do not add up."""
    return manifests[0].get("unigram_entropy") if len(manifests) == 1 else None


class Outcome(NamedTuple):
    """What became of some documents."""

    reason: str
    stage: str
    documents: int
    share: float


def _funnel(manifests: Sequence[dict[str, Any]]) -> list[Outcome]:
    """Documents kept and dropped for each reason, over all sources, in the order of the stages."""
    documents: Counter[tuple[str, str]] = Counter()
    for manifest in manifests:
        for row in manifest.get("funnel", ()):
            documents[row["stage"], row["reason"]] += row["documents"]
    total = max(1, documents.total())
    return [
        Outcome(reason, stage, count, count / total) for (stage, reason), count in documents.items()
    ]


class Attempt(NamedTuple):
    """One start of the run; `last_line` is that of rank 0's log."""

    name: str
    ranks: int
    started: datetime
    last_written: datetime
    last_line: str


def _attempts(run: RunDirectory) -> Iterator[Attempt]:
    for folder in sorted(run.attempts.glob("*")):
        logs = sorted(folder.glob("*.log"))
        written = max((log.stat().st_mtime for log in logs), default=folder.stat().st_mtime)
        yield Attempt(
            folder.name,
            len(logs),
            datetime.fromtimestamp(folder.stat().st_mtime, UTC),
            datetime.fromtimestamp(written, UTC),
            _last_line(logs[0]) if logs else "",
        )


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _settings(tree: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The settings of each section of the configuration, by their dotted names."""
    if phases := tree.pop("phases"):
        tree = tree | {"phases": {str(number): phase for number, phase in enumerate(phases)}}
    return {section: list(_dotted(values, "")) for section, values in tree.items()}


def _dotted(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, list) else str(value)
