"""What the report says of runs before any chart: their state, numbers, alarms and settings."""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pretrain.metrics.credentials import all_without_credentials
from pretrain.metrics.report.layout import COLORS
from pretrain.metrics.report.run import Run
from pretrain.model.config import ModelConfig

NO_ROWS = "No metrics were logged yet."


class Number(NamedTuple):
    """One number of the page's headline."""

    label: str
    value: str
    detail: str


class RunSummary(NamedTuple):
    """A run's line in the table of several."""

    name: str
    color: str
    status: str
    numbers: Sequence[Number]
    by_label: dict[str, Number]


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """What the fragment `headline` needs."""
    summaries = []
    for number, run in enumerate(runs):
        numbers = list(_numbers(run))
        by_label = {number.label: number for number in numbers}
        color = COLORS[number % len(COLORS)]
        summaries.append(RunSummary(run.name, color, status_of(run), numbers, by_label))
    labels = dict.fromkeys(label for summary in summaries for label in summary.by_label)
    return {"runs": summaries, "labels": list(labels)}


def status_of(run: Run) -> str:
    if not run.history.rows:
        return NO_ROWS
    if run.directory.done.exists():
        return "Finished."
    return "Not finished: it is running, or it was stopped."


def alarms(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        where = f"{run.name}: " if len(runs) > 1 else ""
        for alarm in _alarms(run):
            yield where + alarm


def _alarms(run: Run) -> Iterator[str]:
    if (damage := run.history.damage) is not None:
        lines = "line is" if damage.lines == 1 else "lines are"
        yield (
            f"{damage.lines:,} {lines} no JSON and left out, the first of them line "
            f"{damage.first_line:,}: {damage.first_text}"
        )
    for name, series in run.history.series.items():
        if steps := series.non_finite_steps():
            shown = ", ".join(f"{step:,}" for step in steps)
            others = series.non_finite - len(steps)
            more = f" and {others:,} more" if others else ""
            where = "step" if series.non_finite == 1 else "steps"
            yield f"{name} is not finite at {where} {shown}{more}; the charts have gaps there."


def _numbers(run: Run) -> Iterator[Number]:
    history = run.history
    if (step := history.last("train/step")) is not None:
        planned = run.steps_planned
        yield Number("Steps", f"{step:,.0f}", f"of {planned:,}" if planned else "")
    if (tokens := history.last("train/tokens")) is not None:
        yield Number("Tokens", compact(tokens), "trained on")
    if (loss := history.last("train/loss")) is not None:
        detail = "nats per token"
        if run.unigram_entropy is not None:
            detail = f"nats per token; unigram entropy {run.unigram_entropy:.3f}"
        yield Number("Loss", f"{loss:.4f}", detail)
    if (throughput := history.series.get("perf/tokens_per_s")) is not None:
        yield Number(
            "Throughput", compact(float(np.nanmedian(throughput.mean))), "tokens/s, median"
        )
    if (mfu := history.series.get("perf/mfu")) is not None:
        yield Number("MFU", f"{100 * float(np.nanmedian(mfu.mean)):.1f} %", "of the peak, median")
    if (goodput := history.last("perf/goodput")) is not None:
        yield Number("Goodput", f"{100 * goodput:.1f} %", "of the time since the run began")
    if run.config is not None:
        total, active = _parameters(run.config.model)
        yield Number("Model", compact(total), f"parameters, {compact(active)} active per token")


@cache
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


def compact(number: float) -> str:
    """Three significant digits with a unit: 1.23M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = number / size
            return f"{digits:.{2 if digits < 10 else 1 if digits < 100 else 0}f}{unit}"
    return f"{number:.0f}"


def settings_of(runs: Sequence[Run]) -> dict[str, Any]:
    """All settings of one run, or those in which several differ."""
    trees = [all_without_credentials(run.settings) for run in runs]
    if len(runs) == 1:
        return {"settings": _by_section(trees[0])}
    flat = [dict(_dotted(tree, "")) for tree in trees]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [(name, [settings.get(name, "") for settings in flat]) for name in names]
    differing = [(name, values) for name, values in rows if len(set(values)) > 1]
    return {"differing": differing, "names": [run.name for run in runs]}


def _by_section(tree: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The settings of each section of the configuration, by their dotted names."""
    if phases := tree.get("phases"):
        tree = tree | {"phases": {str(number): phase for number, phase in enumerate(phases)}}
    sections = {name: values for name, values in tree.items() if isinstance(values, dict)}
    return {name: list(_dotted(values, "")) for name, values in sections.items() if values}


def _dotted(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, list) else str(value)
