"""In-context learning, on all ranks of a layout: `farspan eval --suite icl`.

Every rank runs `python -m pretrain.evals.icl RUN REQUEST`, where REQUEST is JSON: the fields of
`IclRequest`, and `overrides` of the run's configuration.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.stream import load_tokenizer
from data_pipeline.synthetic import ICL_TASKS
from parallel.mesh import join_ranks
from pretrain.answer import answer
from pretrain.checkpoint.store import on_rank_0
from pretrain.checkpoint.trained import newest_trained
from pretrain.evals.icl_request import (
    ExampleForm,
    IclRequest,
    Prompt,
    example_form,
    fitted,
    prompts,
)
from pretrain.evals.kept import make_room
from pretrain.evals.sharded import Ints, ShardedModel
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.run_dir import RunDirectory, write_atomically

TIMEOUT = timedelta(minutes=30)
# Of the normal distribution, for an interval of 95 %.
Z = 1.959964


@dataclass(frozen=True)
class IclCell:
    """Prompts of one task and number of shots.

    Attributes:
        right: outputs with each token likeliest, given those before it.
        low, high: Wilson's 95 % interval of the accuracy.
        chance: the accuracy of who knows the task and reads no example.
        loss: cross-entropy in nats per token of the outputs.
    """

    task: str
    shots: int
    questions: int
    right: int
    accuracy: float
    low: float
    high: float
    chance: float
    loss: float


@dataclass(frozen=True)
class IclEvaluation:
    """What `RUN/evals/icl-STEP.json` holds.

    Attributes:
        step: of the checkpoint.
        layout: of the ranks, as text.
        form: `tokens` or `text`.
    """

    step: int
    layout: str
    form: str
    request: IclRequest
    cells: tuple[IclCell, ...]


def evaluate(run: RunDirectory, request: IclRequest, overrides: Sequence[str]) -> IclEvaluation:
    """Ask a run's newest whole checkpoint, and write down what it said. Collective."""
    device = join_ranks(TIMEOUT)
    step, trained = newest_trained(run)
    form_name, form = example_form(request.form, load_tokenizer(run.tokenizer))
    config = fitted(trained, overrides, form, request, dist.get_world_size())
    on_rank_0(lambda: make_room(run))
    model = ShardedModel(config, run, step, device)
    cells = tuple(_cells(model, form, request))
    result = IclEvaluation(step, str(model.layout), form_name, request, cells)
    if dist.get_rank() == 0:
        path = run.evaluation("icl", step)
        write_atomically(path, json.dumps(asdict(result), indent=1) + "\n")
    return result


def _cells(model: ShardedModel, form: ExampleForm, request: IclRequest) -> Iterator[IclCell]:
    for name in request.tasks:
        for shots in request.shots:
            cell = ask(model, form, request, name, shots)
            if dist.get_rank() == 0:
                told = f"{name} with {shots} shots: {cell.accuracy:.1%} right"
                print(told, file=sys.stderr, flush=True)
            yield cell


def ask(
    model: ShardedModel, form: ExampleForm, request: IclRequest, name: str, shots: int
) -> IclCell:
    """Prompts of one cell, with the outputs given to the model as it goes (teacher forcing)."""
    length = model.config.data.seq_len
    right, losses = 0, []
    at_a_time = model.rows_at_a_time(length)
    to_come = prompts(form, request, name, shots)
    while chosen := list(islice(to_come, at_a_time)):
        tokens, labels = rows_of(chosen, length)
        scores = model.score(tokens, labels)
        row, _ = np.nonzero(labels != IGNORED)
        wrong = row[scores.predicted != labels[labels != IGNORED]]
        right += len(chosen) - len(np.unique(wrong))
        losses.append(scores.loss)
    asked, loss = request.samples, float(np.concatenate(losses).mean())
    low, high = wilson(right, asked)
    chance = ICL_TASKS[name].chance(form.symbols)
    return IclCell(name, shots, asked, right, right / asked, low, high, chance, loss)


def rows_of(chosen: Sequence[Prompt], length: int) -> tuple[Ints, Ints]:
    """Tokens and labels [rows, length]; what follows a prompt changes nothing of it."""
    tokens = np.zeros((len(chosen), length), np.int64)
    labels = np.full_like(tokens, IGNORED)
    for row, prompt in enumerate(chosen):
        end = len(prompt.tokens)
        tokens[row, :end] = prompt.tokens
        next_tokens = np.where(prompt.is_asked, prompt.tokens, IGNORED)[1:]
        labels[row, : end - 1] = next_tokens
    return tokens, labels


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    share, z2 = right / asked, Z * Z
    middle = share + z2 / (2 * asked)
    half = Z * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked * asked))
    whole = 1 + z2 / asked
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def main() -> IclEvaluation:
    directory, asked = sys.argv[1:]
    fields = json.loads(asked)
    overrides = fields.pop("overrides")
    for name in ("tasks", "shots"):
        fields[name] = tuple(fields[name])
    torch.set_grad_enabled(False)
    return evaluate(RunDirectory(Path(directory)), IclRequest(**fields), overrides)


if __name__ == "__main__":
    answer(main)
