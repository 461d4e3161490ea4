"""Every number a run reports, by name: unit, formula, meaning, reduction over ranks and source.

`python -m pretrain.metrics.registry` writes the table to docs/metrics.md.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from pretrain.metrics.definitions import DEFINITIONS
from pretrain.metrics.metric import REDUCTIONS, Metric

METRICS: dict[str, Metric] = {metric.name: metric for metric in DEFINITIONS}


def help_of(name: str) -> str:
    """What a metric tells; nothing of one that another version has logged."""
    return METRICS[name].help if name in METRICS else ""


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is not registered, with the nearest one that is."""
    for name in names:
        if name not in METRICS:
            nearest = get_close_matches(name, METRICS, n=1, cutoff=0)
            raise ValueError(
                f"metric {name!r} is not registered (nearest: {nearest[0]!r}); "
                "add it to pretrain/metrics/definitions.py"
            )


def as_markdown() -> str:
    """The table as the page docs/metrics.md."""
    rows = [
        f"| `{metric.name}` | {metric.unit} | {metric.formula} | {metric.help} "
        f"| {metric.reduction} | `{metric.source}` |"
        for metric in METRICS.values()
    ]
    return "\n".join(
        [
            "# Metrics",
            "",
            "Made from `pretrain/metrics/definitions.py` by `python -m pretrain.metrics.registry`.",
            "",
            "One row of `metrics.jsonl` is a JSON object with some of these names. A value that is",
            'not finite is one of the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, so that',
            "every row is valid JSON.",
            "",
            "The values of ranks become one by a reduction:",
            "",
            *(f"- {name}: {meaning}." for name, meaning in REDUCTIONS.items()),
            "",
            "| name | unit | formula | what it tells | over ranks | source |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    page = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    page.write_text(as_markdown())
