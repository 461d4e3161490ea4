"""Whether a model uses what stands in earlier segments: trained from scratch on one core.

    python -m bench.long_context_recall [needle] [overwrite] [gradient]

The recipe `recall` is trained on documents of two segments of 64 tokens, twice: with exact
gradients, and without carrying over (`needle`, `overwrite`) or with gradients that end at a
segment's edge (`gradient`, where each training question is a segment away from its answer). Then it
is asked in documents of 16, 4 and 2 segments, a segment away from what it is asked for, also with
`context.carry=false`: who carries nothing over has to guess. Exit code 1: with exact gradients the
model does not learn what is required, or another one does better than guess.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.gated_delta import cpu_model

SEGMENT, SAMPLES = 64, 80
ROW = 2 * SEGMENT
# Tokens of a step of the recipe.
STEP = 64 * ROW
DOCUMENTS = 20000
REQUIRED = 0.95
# Of some hundred answers, far beyond what guessing gives.
TIMES_CHANCE = 2.0
STEPS_OF_A_POINT = 25


class Study(NamedTuple):
    """What is trained on, and what is asked.

    Attributes:
        trained_on: options of `farspan data synthetic` for each source; only the first has a weight
            unless the settings give one to the others.
        settings: further ones of the recipe.
        task, drawn: of what is asked.
        asked: tokens of a document to ask about.
        other: the setting that keeps a second model from learning.
    """

    trained_on: list[str]
    settings: list[str]
    task: str
    drawn: list[str]
    asked: int
    other: str


EXACT, WITHOUT, DETACHED = (
    "context.gradient=exact",
    "context.carry=false",
    "context.gradient=detach",
)
STUDIES = {
    "needle": Study(
        ["--task multi_key --pairs 8 --spread"], [], "needle", [], 16 * SEGMENT, WITHOUT
    ),
    # With values that are asked for before they are overwritten, most is learned soonest; documents
    # of others come later.
    "overwrite": Study(
        [
            "--task overwrite --pairs 4 --values 2 --spread",
            f"--task overwrite --pairs 6 --values 2 --at-end --gap {SEGMENT}",
        ],
        ["train.steps=400", f"data.curriculum=[{{tokens: {200 * STEP}, weights: {{data-1: 1}}}}]"],
        "overwrite",
        ["--pairs", "4", "--values", "2"],
        4 * SEGMENT,
        WITHOUT,
    ),
    "gradient": Study(
        [f"--task multi_key --pairs 8 --at-end --gap {SEGMENT}"],
        [],
        "multi_key",
        ["--pairs", "8"],
        2 * SEGMENT,
        DETACHED,
    ),
}


class Trained(NamedTuple):
    """A model and what it answers, with and without carrying over.

    Attributes:
        losses: of each step.
    """

    setting: str
    tokens: int
    seconds: float
    losses: list[float]
    right: float
    without: float
    chance: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.long_context_recall")
    parser.add_argument("studies", nargs="*", default=list(STUDIES))
    arguments = parser.parse_args()
    if unknown := set(arguments.studies) - set(STUDIES):
        parser.error(f"no such study: {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    print(f"{cpu_model()}; one thread; segments of {SEGMENT} tokens")
    shown = [shows(name, STUDIES[name]) for name in arguments.studies]
    return int(not all(shown))


def shows(name: str, study: Study) -> bool:
    """Train both, print, and say whether the first learns it and the second has to guess."""
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for number, options in enumerate(study.trained_on):
            shards = str(Path(folder) / f"data-{number}")
            sources.append(f"{{path: {shards}, weight: {int(number == 0)}}}")
            farspan(
                *("data", "synthetic", *options.split(), "--length", str(ROW)),
                *("--documents", str(DOCUMENTS), "--vocab-size", "64", "--out", shards),
            )
        both = [
            train(study, setting, sources, str(Path(folder) / str(number)))
            for number, setting in enumerate((EXACT, study.other))
        ]
    trained_on = "; ".join(study.trained_on + study.settings)
    print(f"\n### {name}\n\nTrained on documents of {ROW} tokens: {trained_on}\n")
    print_curves(both)
    print(f"\n| trained with | tokens | CPU s | {study.task}, {study.asked} tokens | {WITHOUT} |")
    print("|---|---:|---:|---:|---:|")
    for it in both:
        print(
            f"| {it.setting} | {it.tokens} | {it.seconds:.0f} | {it.right:.1%} | {it.without:.1%} |"
        )
    print(f"\nchance: {both[0].chance:.1%}; required: {REQUIRED:.0%}", flush=True)
    guessed = [both[0].without, both[1].right, both[1].without]
    return both[0].right >= REQUIRED and max(guessed) <= TIMES_CHANCE * both[0].chance


def train(study: Study, setting: str, sources: list[str], run: str) -> Trained:
    start = os.times()
    settings = [f"data.shards=[{', '.join(sources)}]", *study.settings, setting]
    farspan("train", "recall", "--run-dir", run, *settings, "wandb.mode=disabled")
    end = os.times()
    seconds = end.children_user + end.children_system - start.children_user - start.children_system
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    right, chance = share_right(run, study)
    without, _ = share_right(run, study, WITHOUT)
    losses = [row["train/loss"] for row in steps]
    return Trained(setting, steps[-1]["train/tokens"], seconds, losses, right, without, chance)


def share_right(run: str, study: Study, *settings: str) -> tuple[float, float]:
    """Of the questions about documents of the length that is asked about, and of guesses."""
    printed = farspan(
        *("eval", run, "--suite", "long", "--tasks", study.task, "--samples", str(SAMPLES)),
        *("--lengths", str(study.asked), "--gap", str(SEGMENT), "--json"),
        *(*study.drawn, *settings),
    )
    found = json.loads(printed[printed.index("{") :])
    cells = found["cells"]
    right = sum(cell["right"] for cell in cells) / sum(cell["questions"] for cell in cells)
    return right, found["chance"]


def print_curves(both: Sequence[Trained]) -> None:
    """The mean loss in nats of the steps up to each that is named."""
    ends = range(STEPS_OF_A_POINT, len(both[0].losses) + 1, STEPS_OF_A_POINT)
    print(f"| nats at step | {' | '.join(map(str, ends))} |\n|---|{'---:|' * len(ends)}")
    for it in both:
        points = [it.losses[end - STEPS_OF_A_POINT : end] for end in ends]
        means = " | ".join(f"{sum(point) / len(point):.2f}" for point in points)
        print(f"| {it.setting} | {means} |")


def farspan(*arguments: str) -> str:
    """What the command prints."""
    command = [sys.executable, "-c", "from launch.cli import main; main()", *arguments]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
