"""What W&B should have of a run: rows, evaluations and samples, each at its step."""

import json
from pathlib import Path
from typing import Any

from launch.wandb_rows import mirrored_rows
from pretrain.metrics.registry import METRICS
from pretrain.metrics.samples import Sample, write_samples
from pretrain.metrics.wandb_sink import scalars
from pretrain.run_dir import RunDirectory

CELL = {"task": "needle", "questions": 4}
LONG = {
    "cells": [
        CELL | {"length": 4096, "depth": 0.0, "right": 4},
        CELL | {"length": 4096, "depth": 1.0, "right": 1},
        CELL | {"length": 8192, "depth": 0.0, "right": 0},
    ],
    "loss_by_position": [{"first": 1, "last": 1, "loss": 2.5}],
}
SCORE = {"task": "hellaswag", "metric": "acc", "filter": "none", "shots": 0, "value": 0.25}
ICL = {"cells": [{"task": "copy", "shots": n, "accuracy": n / 4} for n in (1, 4)]}
LM_EVAL = {
    "rows": [
        SCORE,
        SCORE | {"shots": 1, "filter": "strict", "value": 0.5},
        SCORE | {"shots": 5, "value": None},
    ]
}


def write(run: RunDirectory, suite: str, step: int, tree: dict[str, Any]) -> None:
    run.evaluations.mkdir(exist_ok=True)
    run.evaluation(suite, step).write_text(json.dumps({"step": step, **tree}))


def test_evaluations_stand_in_the_row_of_their_step_or_in_one_of_their_own(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"train/step": 2, "train/loss": 5.0}\n{"train/step": 4}\n')
    write(run, "long", 2, LONG)
    write(run, "lm-eval", 2, LM_EVAL)
    write(run, "icl", 2, ICL)
    write(run, "lm-eval", 3, {"rows": [SCORE]})
    write(run, "of-tomorrow", 2, {"numbers": 3})
    run.folder_of(1).mkdir(parents=True)
    sample = Sample(0, "books", 7, 0, 0, 3, "Once")
    write_samples(run, 1, 4, [sample])
    by_step = {row.step: row.samples for row in mirrored_rows(run, 4)}
    assert by_step == {2: (), 4: (sample,), 3: ()}
    # What a live run logs meanwhile does not count yet, and what is evaluated does.
    first, alone = mirrored_rows(run, 2)
    assert scalars(first.values) == {
        "train/step": 2,
        "train/loss": 5.0,
        "eval/needle/4096": 5 / 8,
        "eval/needle/8192": 0.0,
        "eval/loss_by_position/1": 2.5,
        "eval/icl_copy/1 shot": 0.25,
        "eval/icl_copy/4 shots": 1.0,
        "eval/lm_eval/hellaswag/acc/0 shots": 0.25,
        "eval/lm_eval/hellaswag/acc/strict/1 shot": 0.5,
    }
    assert {*first.values, *alone.values} <= METRICS.keys()
    assert scalars(alone.values) == {"train/step": 3, "eval/lm_eval/hellaswag/acc/0 shots": 0.25}
