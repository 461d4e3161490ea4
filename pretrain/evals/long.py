"""Evaluation on long contexts, on all ranks of a layout: `farspan eval --suite long`.

Every rank runs `python -m pretrain.evals.long RUN REQUEST`, where REQUEST is JSON: the fields of
`Request`, and `overrides` of the run's configuration.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.stream import load_tokenizer
from data_pipeline.synthetic import random_numbers
from parallel.mesh import join_ranks
from pretrain.answer import answer
from pretrain.checkpoint.store import on_rank_0
from pretrain.checkpoint.trained import newest_trained
from pretrain.evals.by_position import Bucket, loss_by_position
from pretrain.evals.forms import Form, form_of
from pretrain.evals.kept import make_room
from pretrain.evals.request import Request, prepared
from pretrain.evals.sharded import ShardedModel
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.run_dir import RunDirectory, write_atomically

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Cell:
    """Documents of one task, length and depth of the needle.

    Attributes:
        accuracy: the share of questions with each token of the answer right.
        loss: cross-entropy in nats per token of the answers.
    """

    task: str
    length: int
    depth: float | None
    questions: int
    right: int
    accuracy: float
    loss: float


@dataclass(frozen=True)
class LongEvaluation:
    """What `RUN/evals/long-STEP.json` holds.

    Attributes:
        step: of the checkpoint.
        layout: of the ranks, as text.
        form: `tokens` or `text`.
        chance: the accuracy of who guesses a token of an answer.
        loss_by_position: empty without `request.shards`.
    """

    step: int
    layout: str
    form: str
    chance: float
    request: Request
    cells: tuple[Cell, ...]
    loss_by_position: tuple[Bucket, ...]


def evaluate(run: RunDirectory, request: Request, overrides: list[str]) -> LongEvaluation:
    """Ask a run's newest whole checkpoint, and write down what it said. Collective."""
    device = join_ranks(TIMEOUT)
    step, trained = newest_trained(run)
    request = request.completed(trained)
    config = prepared(trained, overrides, request.lengths, dist.get_world_size())
    form_name, form = form_of(request.form, load_tokenizer(run.tokenizer))
    for name in request.tasks:
        for length in request.lengths:
            form.check(request.task(name), length)
    on_rank_0(lambda: make_room(run))
    model = ShardedModel(config, run, step, device)
    # First, for it may find that the shards will not do.
    buckets = loss_by_position(model, run, request) if request.shards else ()
    result = LongEvaluation(
        step=step,
        layout=str(model.layout),
        form=form_name,
        chance=form.chance,
        request=request,
        cells=tuple(_cells(model, form, request)),
        loss_by_position=buckets,
    )
    if dist.get_rank() == 0:
        path = run.evaluation("long", step)
        write_atomically(path, json.dumps(asdict(result), indent=1) + "\n")
    return result


def _cells(model: ShardedModel, form: Form, request: Request) -> Iterator[Cell]:
    for length in request.lengths:
        for name in request.tasks:
            for depth in request.depths(name):
                cell = ask(model, form, request, name, length, depth)
                if dist.get_rank() == 0:
                    at = "" if depth is None else f", depth {depth:.0%}"
                    told = f"{name} of {length:,} tokens{at}: {cell.accuracy:.1%} right"
                    print(told, file=sys.stderr, flush=True)
                yield cell


def ask(
    model: ShardedModel,
    form: Form,
    request: Request,
    name: str,
    length: int,
    depth: float | None = None,
) -> Cell:
    """Documents of one cell, with the answers given to the model as it goes (teacher forcing)."""
    task = request.task(name)
    right, questions, losses = 0, 0, []
    at_a_time = model.rows_at_a_time(length)
    for first in range(0, request.samples, at_a_time):
        documents = [
            form.write(task, length, rng, depth)
            for number in range(first, min(first + at_a_time, request.samples))
            for rng in [random_numbers(request.seed, "evaluation", task, length, number)]
        ]
        tokens = np.stack([document.tokens for document in documents])
        question = np.stack([document.question for document in documents])
        question += np.where(question < 0, 0, np.arange(len(documents))[:, None] * task.questions)
        labels = np.full_like(tokens, IGNORED)
        labels[:, :-1] = np.where(question[:, 1:] < 0, IGNORED, tokens[:, 1:])
        scores = model.score(tokens, labels)
        wrong = question[:, 1:][question[:, 1:] >= 0][scores.predicted != labels[labels != IGNORED]]
        questions += len(documents) * task.questions
        right += len(documents) * task.questions - len(np.unique(wrong))
        losses.append(scores.loss)
    loss = float(np.concatenate(losses).mean())
    return Cell(name, length, depth, questions, right, right / questions, loss)


def main() -> LongEvaluation:
    directory, asked = sys.argv[1:]
    fields = json.loads(asked)
    overrides = fields.pop("overrides")
    for name in ("lengths", "tasks"):
        fields[name] = tuple(fields[name])
    torch.set_grad_enabled(False)
    return evaluate(RunDirectory(Path(directory)), Request(**fields), overrides)


if __name__ == "__main__":
    answer(main)
