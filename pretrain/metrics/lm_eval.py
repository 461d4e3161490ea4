"""What is shown of `farspan eval --suite lm-eval`: a column per number of examples, as in GPT-3."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pretrain.metrics.registry import METRICS
from pretrain.run_dir import RunDirectory

NAME = "eval/lm_eval"
# Of the harness, for all answers as the model gave them.
NO_FILTER = ("none", "take_first")


class ScoreRow(NamedTuple):
    """A task and a metric, with an arrow where lower is better; an empty cell was not asked."""

    label: str
    cells: tuple[str, ...]


class ScoreTable(NamedTuple):
    """
    Attributes:
        suite: what has asked.
        title: of the first column.
        notes: what a reader has to know of the numbers.
        help: what the metric tells.
    """

    suite: str
    step: int
    title: str
    columns: tuple[str, ...]
    rows: tuple[ScoreRow, ...]
    notes: tuple[str, ...]
    help: str


def read_lm_eval(run: RunDirectory) -> ScoreTable | None:
    """Of the newest checkpoint that was evaluated; None if there is none."""
    files = sorted(run.evaluations.glob("lm-eval-*.json"))
    return score_table(json.loads(files[-1].read_text())) if files else None


def score_table(tree: Mapping[str, Any]) -> ScoreTable:
    """
    Args:
        tree: what `RUN/evals/lm-eval-STEP.json` holds.
    """
    scores: Sequence[Mapping[str, Any]] = tree["rows"]
    shots = sorted({score["shots"] for score in scores})
    by_label: dict[str, dict[int, Mapping[str, Any]]] = {}
    for score in scores:
        by_label.setdefault(_label(score), {})[score["shots"]] = score
    rows = tuple(
        ScoreRow(
            label,
            (
                _chance(next(iter(found.values()))),
                *(_cell(found[n]) if n in found else "" for n in shots),
            ),
        )
        for label, found in by_label.items()
    )
    columns = ("chance", *(f"{n} shot" if n == 1 else f"{n} shots" for n in shots))
    notes, what = _notes(scores), METRICS[NAME].help
    return ScoreTable("lm-evaluation-harness", tree["step"], "task", columns, rows, notes, what)


def _label(score: Mapping[str, Any]) -> str:
    chosen = "" if score["filter"] in NO_FILTER else f" ({score['filter']})"
    better = "" if score["higher_is_better"] else " ↓"
    return f"{score['task']} {score['metric']}{chosen}{better}"


def _chance(score: Mapping[str, Any]) -> str:
    return "" if score["chance"] is None else f"{score['chance']:.1%}"


def _cell(score: Mapping[str, Any]) -> str:
    value, stderr = score["value"], score["stderr"]
    if value is None:
        return "not finite"
    # Shares, of which most metrics are, as percent; perplexities and the like as they are.
    is_share = 0 <= value <= 1 and score["higher_is_better"]
    shown, error = (f"{value:.1%}", "{:.1%}") if is_share else (f"{value:.4g}", "{:.2g}")
    return shown if stderr is None else f"{shown} ± {error.format(stderr)}"


def _by_task(scores: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for score in scores:
        by_task.setdefault(score["task"], []).append(score)
    return by_task


def _described(task: tuple[str, list[Mapping[str, Any]]]) -> str:
    """`arc_easy 1.0: 2,376 questions`."""
    name, scores = task
    versions = " or ".join(sorted({score["version"] for score in scores} - {""}))
    asked = " or ".join(f"{count:,}" for count in sorted({score["samples"] for score in scores}))
    return f"{name} {versions}".rstrip() + f": {asked} questions"


def _notes(scores: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    harness = sorted({score["harness"] for score in scores})
    of_tasks = ", ".join(map(_described, _by_task(scores).items()))
    notes = [f"± is the standard error; harness {', '.join(harness)}; {of_tasks}"]
    cut = {(score["task"], score["shots"]): score for score in scores if score["truncated"]}
    for (task, shots), score in cut.items():
        notes.append(
            f"truncated: {score['truncated']:,} of {score['requests']:,} contexts of {task} with "
            f"{shots} shots began beyond the {score['max_length']:,} tokens that the model sees"
        )
    return tuple(notes)
