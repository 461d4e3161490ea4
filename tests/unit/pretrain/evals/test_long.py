"""Counting, with models that are asked in place of a real one."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data_pipeline.shards import TokenReader
from data_pipeline.synthetic import Task, random_numbers
from data_pipeline.synthetic.shards import make_synthetic
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.evals.by_position import by_powers_of_two, loss_by_position
from pretrain.evals.forms import TokenForm
from pretrain.evals.long import ask
from pretrain.evals.request import Request
from pretrain.evals.sharded import Scores
from pretrain.run_dir import RunDirectory

IGNORED = -100
FORM = TokenForm(128)


@dataclass
class Knowing:
    """A model that knows every answer but those that `wrong` says of their number in a pass."""

    wrong: set[int]
    passes: list[np.ndarray] = field(default_factory=list)

    def rows_at_a_time(self, length: int) -> int:
        return 3

    def score(self, tokens: np.ndarray, labels: np.ndarray) -> Scores:
        self.passes.append(tokens)
        is_label = labels != IGNORED
        assert (labels[:, :-1] == tokens[:, 1:])[is_label[:, :-1]].all(), "the token that follows"
        predicted = labels[is_label].copy()
        predicted[sorted(self.wrong)] += 1
        return Scores(predicted, np.arange(len(predicted), dtype=np.float64))


@pytest.mark.parametrize(
    ("task", "wrong", "right"),
    [
        ("multi_key", set(), 8 * 4),
        ("multi_key", {0, 5}, 8 * 4 - 3 * 2),
        # Two tokens of one question, and one of another: passes of 3, 3 and 2 documents.
        ("multi_value", {0, 1, 3}, 8 * 4 - 3 * 2),
        ("overwrite", {4}, 8 * 4 - 3),
    ],
)
def test_a_question_is_right_if_each_token_of_its_answer_is(task, wrong, right) -> None:
    request = Request(lengths=(200,), samples=8, pairs=4, values=3)
    model = Knowing(wrong)
    cell = ask(model, FORM, request, task, 200)
    assert (cell.questions, cell.right) == (32, right)
    assert cell.accuracy == right / 32
    assert [len(tokens) for tokens in model.passes] == [3, 3, 2]


def test_documents_follow_from_the_seed_and_not_from_how_many_there_are() -> None:
    def asked(**fields: int) -> np.ndarray:
        model = Knowing(set())
        ask(model, FORM, Request(lengths=(100,), **fields), "needle", 100, 0.5)
        return np.concatenate(model.passes)

    assert (asked(samples=2) == asked(samples=5)[:2]).all()
    assert (asked(samples=5) != asked(samples=5, seed=1)).any()


def test_with_a_gap_of_a_segment_no_answer_stands_in_the_segment_of_its_question() -> None:
    model, segment = Knowing(set()), 64
    ask(model, FORM, Request(lengths=(192,), samples=9, gap=segment), "multi_key", 192)
    tokens = np.concatenate(model.passes)
    stated, asked = (tokens == FORM.alphabet.names.index(word) for word in ("set", "ask"))
    assert (stated.sum(1) == 4).all()
    in_segment_of_question = asked.reshape(9, 3, segment).any(2)
    assert in_segment_of_question.any()
    assert not (stated.reshape(9, 3, segment).any(2) & in_segment_of_question).any()


def test_no_document_is_one_of_a_training_of_the_same_seed(tmp_path: Path) -> None:
    task = Task(name="needle")
    shards = {"length": 100, "documents": 20, "vocab_size": 128, "seed": 7}
    reader = TokenReader(make_synthetic(task, tmp_path, **shards).manifest)
    trained_on = {reader.read(number, 0, 100).tobytes() for number in range(20)}
    model = Knowing(set())
    ask(model, FORM, Request(lengths=(100,), samples=20, seed=7), "needle", 100)
    asked = np.concatenate(model.passes).astype(np.uint16)
    assert not trained_on & {tokens.tobytes() for tokens in asked}
    rng = random_numbers(7, "training", task, 100, 3)
    again = FORM.write(task, 100, rng, None).tokens.astype(np.uint16)
    assert again.tobytes() in trained_on


def test_losses_are_put_intoby_powers_of_two_that_end_at_powers_of_two() -> None:
    seen = np.array([1, 2, 3, 3, 4, 7, 16, 31, 1])
    buckets = by_powers_of_two(seen, np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 2]))
    assert [(b.first, b.last, b.tokens, b.loss) for b in buckets] == [
        (1, 1, 2, 1.5),
        (2, 3, 3, 3.0),
        (4, 7, 2, 5.5),
        (16, 31, 2, 7.5),
    ]


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    task, sizes = Task(name="needle"), {"length": 100, "documents": 2, "seed": 0}
    for vocab_size in (64, 128):
        make_synthetic(task, tmp_path / str(vocab_size), vocab_size=vocab_size, **sizes)
    run = RunDirectory(tmp_path / "64")
    model = SimpleNamespace(config=load_config("tiny"))
    request = Request(lengths=(50,), shards=str(tmp_path / "128"))
    with pytest.raises(UserError, match=r"--shards .*128 has another tokenizer than"):
        loss_by_position(model, run, request)


def test_shards_of_less_than_one_row_are_refused_rather_than_read_again(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    make_synthetic(Task(name="needle"), shards, length=100, documents=2, vocab_size=64, seed=0)
    model = SimpleNamespace(config=load_config("tiny"))
    request = Request(lengths=(50, 201), shards=str(shards))
    with pytest.raises(UserError, match=r"has 200 tokens, less than one row .* --lengths, 201"):
        loss_by_position(model, RunDirectory(shards), request)
