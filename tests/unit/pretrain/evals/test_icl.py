"""Examples tell the rule, and only they; what is asked of a model, and how it is counted."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_pipeline.shards import TokenReader
from data_pipeline.stream import Tokenizer, load_tokenizer
from data_pipeline.synthetic import ICL_TASKS, Alphabet, Example, draw_examples
from data_pipeline.synthetic.shards import make_examples
from data_pipeline.tokenize import train_tokenizer
from launch.evaluation_icl import tables_of
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.evals.icl import ask, rows_of, wilson
from pretrain.evals.icl_request import (
    IclRequest,
    TextExamples,
    TokenExamples,
    example_form,
    fitted,
    parse_shots,
    prompts,
)
from pretrain.evals.sharded import Scores
from pretrain.metrics.icl import read_icl
from pretrain.run_dir import RunDirectory

IGNORED, ASK = -100, 3
SYMBOLS = 6
FORM = TokenExamples(Alphabet(4 + 4 * SYMBOLS))
Symbols = tuple[int, ...]


def solve(name: str, shots: Sequence[Example], given: Symbols, rng: np.random.Generator) -> Symbols:
    """What one answers who knows the tasks, and reads the examples."""
    if name in ("copy", "reversal"):
        likely = [given, given[::-1]]
        if shots:
            likely = [given if shots[0].wanted == shots[0].given else given[::-1]]
    elif name == "arithmetic":
        modulus = min(10, SYMBOLS)
        likely = [((given[0] + n) % modulus,) for n in range(modulus)]
        if shots:
            likely = [((given[0] + shots[0].wanted[0] - shots[0].given[0]) % modulus,)]
    elif name == "pattern":
        places = [p for p in product((0, 1), repeat=3) if 0 < sum(p) < 3]
        fits = [p for p in places if all(tuple(x[i] for i in p) == y for x, y in shots)]
        likely = [tuple(given[i] for i in p) for p in fits]
    else:
        likely = translations(shots, given)
    return likely[int(rng.integers(len(likely)))]


def translations(shots: Sequence[Example], given: Symbols) -> list[Symbols]:
    if not shots:
        return list(permutations(range(SYMBOLS), 3))
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        means: dict[int, int] = {}
        pairs = [(x[place], word) for x, y in shots for place, word in zip(order, y, strict=True)]
        if all(means.setdefault(word, foreign) == foreign for word, foreign in pairs):
            found.append(tuple(means[given[place]] for place in order))
    return found


def accuracy(name: str, shots: int, samples: int) -> tuple[int, int]:
    right, rng = 0, np.random.default_rng(1)
    for number in range(samples):
        *shown, asked = draw_examples(name, SYMBOLS, shots + 1, np.random.default_rng(number))
        right += solve(name, shown, asked.given, rng) == asked.wanted
    return right, samples


@pytest.mark.parametrize("name", ICL_TASKS)
def test_who_reads_the_examples_knows_the_rule_and_who_does_not_is_left_to_chance(name) -> None:
    assert accuracy(name, 16, 100) == (100, 100)
    right, samples = accuracy(name, 0, 600)
    chance = ICL_TASKS[name].chance(SYMBOLS)
    assert abs(right / samples - chance) < 4 * (chance * (1 - chance) / samples) ** 0.5


class Knowing:
    """A model that knows every output, but for those of the passes' rows that `wrong` names."""

    def __init__(self, length: int, wrong: set[int]) -> None:
        self.config = load_config("tiny", [f"data.seq_len={length}"])
        self.wrong, self.rows, self.labels = wrong, 0, []

    def rows_at_a_time(self, length: int) -> int:
        return 7

    def score(self, tokens: np.ndarray, labels: np.ndarray) -> Scores:
        self.labels.append(Counter((labels != IGNORED).sum(1).tolist()))
        row, place = np.nonzero(labels != IGNORED)
        assert (tokens[row, place + 1] == labels[row, place]).all(), "the token that follows"
        predicted = labels[row, place].copy()
        for number in range(len(labels)):
            if self.rows + number in self.wrong:
                predicted[np.flatnonzero(row == number)[-1]] += 1
        self.rows += len(labels)
        return Scores(predicted, np.ones(len(predicted)))


def test_an_output_is_right_if_each_of_its_tokens_is() -> None:
    model, request = Knowing(100, {0, 6, 19}), IclRequest(samples=20)
    cell = ask(model, FORM, request, "copy", 4)
    assert (cell.questions, cell.right, cell.accuracy) == (20, 17, 0.85)
    assert model.labels == [Counter({4: 7}), Counter({4: 7}), Counter({4: 6})]
    assert cell.low < 0.85 < cell.high


def test_the_interval_is_that_of_the_literature() -> None:
    # Newcombe 1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I.
    for right, asked, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
    ):
        assert wilson(right, asked) == pytest.approx((low, high), abs=5e-5)


def test_text_says_what_the_examples_say(tmp_path: Path) -> None:
    train_tokenizer(["Input: Output: babe bedi 0123456789 \n"], 300, tmp_path / "tokenizer.json")
    tokenizer: Tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    name, form = example_form("auto", tokenizer)
    assert (name, type(form)) == ("text", TextExamples)
    for prompt in prompts(form, IclRequest(samples=5), "reversal", 2):
        *lines, asked = tokenizer.decode(prompt.tokens.tolist()).strip().split("\n")
        assert len(lines) == 5
        words = [line.partition(": ")[2].split() for line in (*lines, asked)]
        assert [line.partition(":")[0] for line in (*lines, asked)] == ["Input", "Output"] * 3
        assert all(words[n] == words[n + 1][::-1] for n in (0, 2, 4))
        answer = tokenizer.decode(prompt.tokens[prompt.is_asked].tolist())
        assert answer.split() == words[5]


def test_no_prompt_is_an_end_of_a_document_of_a_training_of_the_same_seed(tmp_path: Path) -> None:
    sizes = {"length": 100, "documents": 300, "vocab_size": 28, "seed": 0}
    manifest = make_examples(tuple(ICL_TASKS), tmp_path, **sizes).manifest
    reader = TokenReader(manifest)
    trained = [reader.read(n, 0, 99).astype(np.int64).tolist() for n in range(300)]
    assert manifest.predicted_from == FORM._alphabet.first_answer
    assert len({tokens.count(ASK) for tokens in trained}) == 4, "tasks are mixed"
    for prompt in prompts(FORM, IclRequest(samples=50), "translation", 8):
        asked = prompt.tokens.tolist()
        assert all(asked != document[-len(asked) :] for document in trained)


def test_prompts_are_padded_to_rows_that_ranks_can_share() -> None:
    longest = 17 * 9
    trained = load_config("tiny", ["parallel.cp=8", "train.global_batch=8"])
    config = fitted(trained, [], FORM, IclRequest(samples=1), 8)
    assert config.data.seq_len == longest + 7
    (prompt,) = prompts(FORM, IclRequest(samples=1), "copy", 16)
    tokens, labels = rows_of([prompt], config.data.seq_len)
    assert tokens.shape == (1, longest + 7)
    assert np.flatnonzero(labels[0] != IGNORED).tolist() == list(range(longest - 5, longest - 1))
    with pytest.raises(UserError, match=r"--shots 16: prompts take up to 153 tokens, .* for 128"):
        fitted(load_config("tiny", ["data.seq_len=128"]), [], FORM, IclRequest(samples=1), 1)


@pytest.mark.parametrize("text", ["", "1,x", "-1", "1.5"])
def test_numbers_of_shots_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be numbers of examples"):
        parse_shots(text)
    assert parse_shots("4, 0,1,4") == (0, 1, 4)


def test_tables_have_a_row_per_task_and_a_column_per_number_of_shots(tmp_path: Path) -> None:
    request = {"tasks": ["copy", "pattern"], "shots": [0, 1], "samples": 20}
    cells = [
        {
            "task": task,
            "shots": shots,
            "chance": 0.25,
            "accuracy": right / 20,
            **dict(zip(("low", "high"), wilson(right, 20), strict=True)),
        }
        for task, of_task in (("copy", (5, 20)), ("pattern", (0, 9)))
        for shots, right in enumerate(of_task)
    ]
    result = {"step": 7, "form": "tokens", "request": request, "cells": cells}
    console = Console(file=io.StringIO(), width=80)
    for table in tables_of(result):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines == [
        ["outputs", "right", "chance", "0", "shots", "1", "shot"],
        ["copy", "25.0%", "25.0%", "100.0%"],
        ["pattern", "25.0%", "0.0%", "45.0%"],
        ["95", "%", "interval", "0", "shots", "1", "shot"],
        ["copy", "11-47", "84-100"],
        ["pattern", "0-16", "26-66"],
    ]
    run = RunDirectory(tmp_path)
    run.evaluations.mkdir()
    run.evaluation("icl", 7).write_text(json.dumps(result))
    shown = read_icl(run)
    assert shown is not None
    assert shown.columns == ("chance", "0 shots", "1 shot")
    assert shown.rows[1] == ("pattern", ("25.0%", "0.0% [0, 16]", "45.0% [26, 66]"))
