"""What W&B should have of a run: the rows of metrics.jsonl, what evaluations found at their steps,
and the samples of its data.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.metrics.samples import Sample, read_samples
from pretrain.metrics.sinks import read_metrics
from pretrain.run_dir import RunDirectory

# Of lm-evaluation-harness, for all answers as the model gave them.
NO_FILTER = ("none", "take_first")


@dataclass(frozen=True)
class MirroredRow:
    """A row as W&B should have it; of a step with evaluations alone, without anything else."""

    values: Mapping[str, Any]
    samples: tuple[Sample, ...] = ()

    @property
    def step(self) -> int:
        return int(self.values["train/step"])


def mirrored_rows(run: RunDirectory, last: int) -> Iterator[MirroredRow]:
    """In one pass over metrics.jsonl.

    Args:
        last: the step of the last row of metrics.jsonl that counts.
    """
    evaluations, samples = read_evaluations(run), read_samples(run)
    for row in read_metrics(run.metrics):
        step = int(row["train/step"])
        if step <= last:
            yield MirroredRow(
                row | evaluations.pop(step, {}),
                tuple(samples.get(step, ())),
            )
    for step in sorted(evaluations):
        yield MirroredRow({"train/step": step, **evaluations[step]})


def read_evaluations(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """What `farspan eval --suite` has found, by the step of the checkpoint, under the names of the
    registry: {metric: {what was asked: number}}.
    """
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for path in sorted(run.evaluations.glob("*.json")):
        suite, _, _ = path.stem.rpartition("-")
        tree = json.loads(path.read_text())
        if suite in NUMBERS_OF:
            found[int(tree["step"])] |= NUMBERS_OF[suite](tree)
    return dict(found)


def numbers_of_long(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of questions by length, all depths together; losses by the first place of a bucket."""
    asked: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in tree["cells"]:
        asked[cell["task"], cell["length"]].append(cell)
    numbers: dict[str, Any] = defaultdict(dict)
    for (task, length), cells in asked.items():
        right, questions = (sum(cell[name] for cell in cells) for name in ("right", "questions"))
        numbers[f"eval/{task}"][str(length)] = right / questions
    for bucket in tree["loss_by_position"]:
        numbers["eval/loss_by_position"][str(bucket["first"])] = bucket["loss"]
    return dict(numbers)


def numbers_of_icl(tree: Mapping[str, Any]) -> dict[str, Any]:
    """By number of examples."""
    numbers: dict[str, Any] = defaultdict(dict)
    for cell in tree["cells"]:
        numbers[f"eval/icl_{cell['task']}"][_shots(cell["shots"])] = cell["accuracy"]
    return dict(numbers)


def numbers_of_lm_eval(tree: Mapping[str, Any]) -> dict[str, Any]:
    """By task, metric and number of examples; what is not finite is left out."""
    numbers = {}
    for row in tree["rows"]:
        if row["value"] is not None:
            chosen = () if row["filter"] in NO_FILTER else (row["filter"],)
            words = (row["task"], row["metric"], *chosen, _shots(row["shots"]))
            numbers["/".join(words)] = row["value"]
    return {"eval/lm_eval": numbers} if numbers else {}


def _shots(count: int) -> str:
    return f"{count} shot" if count == 1 else f"{count} shots"


NUMBERS_OF = {"long": numbers_of_long, "icl": numbers_of_icl, "lm-eval": numbers_of_lm_eval}
