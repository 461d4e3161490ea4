"""Whether a model uses what stands in earlier segments: trained from scratch on one core.

    python -m bench.long_context_recall [needle] [overwrite] [gradient]

`needle` and `overwrite` train the recipe `recall` in segments of 64 tokens and ask it in documents
of 16 and of 4 times that length; `carry=false` asks the same model without what segments hand on,
and a second one is trained so. `gradient` trains with exact and with detached gradients on
documents of eight segments whose only question stands at the end. Exit code 1: what is required is
not reached, or is reached without carrying over or without the gradient of earlier segments.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench.gated_delta import cpu_model

SEGMENT, SAMPLES = 64, 40
REQUIRED = 0.95


class Study(NamedTuple):
    """What is trained on, and what is asked.

    Attributes:
        trained_on: options of `farspan data synthetic`.
        drawn: more of them, which are also those of what is asked.
        length: tokens of a document to train on.
        settings: further ones of the recipe.
        asked: tokens of a document to ask about.
        modes: settings of `context` to train with.
    """

    task: str
    trained_on: list[str]
    drawn: list[str]
    length: int
    settings: list[str]
    asked: int
    modes: list[list[str]]


EXACT, WITHOUT = ["context.gradient=exact"], ["context.carry=false"]
DETACHED = ["context.gradient=detach"]
STUDIES = {
    "needle": Study(
        "needle",
        ["--task", "multi_key", "--spread"],
        ["--pairs", "8"],
        256,
        [],
        16 * SEGMENT,
        [EXACT, WITHOUT],
    ),
    "overwrite": Study(
        "overwrite",
        ["--task", "overwrite", "--spread"],
        ["--pairs", "4", "--values", "2"],
        128,
        ["train.steps=500", "train.global_batch=64", "train.microbatch=64"],
        4 * SEGMENT,
        [EXACT, WITHOUT],
    ),
    "gradient": Study(
        "needle",
        ["--task", "needle", "--at-end"],
        [],
        512,
        ["train.steps=400"],
        512,
        [EXACT, DETACHED],
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.long_context_recall")
    parser.add_argument("studies", nargs="*", default=list(STUDIES))
    arguments = parser.parse_args()
    if unknown := set(arguments.studies) - set(STUDIES):
        parser.error(f"no such study: {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    print(f"{cpu_model()}; one thread; segments of {SEGMENT} tokens\n")
    print("| task | trained with | steps of tokens | CPU s | asked at | right | carry=false |")
    print("|---|---|---|---:|---:|---:|---:|")
    shown = [shows(STUDIES[name]) for name in arguments.studies]
    return int(not all(shown))


def shows(study: Study) -> bool:
    """Train in each mode, ask, print; whether the first mode learns it, and no other."""
    right: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        documents = ["--length", str(study.length), "--documents", "30000", "--vocab-size", "64"]
        options = [*study.trained_on, *study.drawn, *documents]
        farspan("data", "synthetic", *options, "--out", str(data))
        for number, mode in enumerate(study.modes):
            run = str(Path(folder) / str(number))
            segments = f"context.segments={study.length // SEGMENT}"
            rows = [f"data.seq_len={study.length}", segments]
            start = os.times()
            farspan(
                *("train", "recall", "--run-dir", run, f"data.shards={data}", *rows),
                *(*study.settings, *mode, "wandb.mode=disabled"),
            )
            end = os.times()
            seconds = end.children_user + end.children_system
            seconds -= start.children_user + start.children_system
            right.append(share_right(run, study, []))
            without = share_right(run, study, WITHOUT)
            print(
                f"| {study.task} | {mode[0].removeprefix('context.')} | {tokens_of(run)} | "
                f"{seconds:.0f} | {study.asked} | {right[-1]:.1%} | {without:.1%} |",
                flush=True,
            )
    return right[0] >= REQUIRED > max(right[1:])


def share_right(run: str, study: Study, settings: list[str]) -> float:
    """Of the questions about documents of the length that is asked about."""
    printed = farspan(
        *("eval", run, "--suite", "long", "--tasks", study.task, "--samples", str(SAMPLES)),
        *("--lengths", str(study.asked), "--json", *study.drawn, *settings),
    )
    found = json.loads(printed[printed.index("{") :])
    return sum(c["right"] for c in found["cells"]) / sum(c["questions"] for c in found["cells"])


def tokens_of(run: str) -> str:
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "train/step" in row][-1]
    return f"{last['train/step']} x {last['train/tokens'] // last['train/step']}"


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
