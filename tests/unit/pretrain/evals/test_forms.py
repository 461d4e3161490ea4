import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.stream import Tokenizer, load_tokenizer
from data_pipeline.synthetic import TASKS, Alphabet, Task, random_numbers
from data_pipeline.tokenize import train_tokenizer
from pretrain.errors import UserError
from pretrain.evals.forms import FILLER, TextForm, TokenForm, form_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("forms") / "tokenizer.json"
    train_tokenizer([*FILLER, "The number of is. 1234567, 890"], 400, path)
    return load_tokenizer(path)


def stated(text: str, task: str) -> dict[str, list[str]]:
    """What a reader of the text answers to each subject."""
    answers: dict[str, list[str]] = {}
    if task == "variable_tracking":
        of: dict[str, str] = {}
        for variable, source, value in re.findall(
            r"Variable (\w+) is (?:a copy of (\w+)|(\d+))", text
        ):
            of[variable] = value or of[source]
            answers.setdefault(of[variable], []).append(variable)
        return answers
    for key, value in re.findall(r"The number of (\w+) is(?: now)? (\d+)", text):
        answers.setdefault(key, []).append(value)
    return answers if task == "multi_value" else {key: of[-1:] for key, of in answers.items()}


@pytest.mark.parametrize("name", TASKS)
def test_the_text_states_what_it_asks_for(name: str, tokenizer: Tokenizer) -> None:
    task, form = Task(name=name, pairs=3, values=2), TextForm(tokenizer)
    for number, length in enumerate((1200, 1201, 1500)):
        document = form.write(task, length, random_numbers(0, "test", task, number), None)
        assert len(document.tokens) == len(document.question) == length
        assert document.tokens[-1] == tokenizer.eos_id
        haystack, *questions = tokenizer.decode(document.tokens.tolist()).split("\nQuestion: ")
        expected = stated(haystack, name)
        assert len(questions) == task.questions
        for asked, question in enumerate(questions):
            subject = re.match(r".*?(\w+)(?:, in [a-z ]*)?\?", question)
            assert subject
            answer = tokenizer.decode(document.tokens[document.question == asked].tolist())
            assert answer.split() == expected[subject[1]]


def test_a_needle_lies_between_sentences_at_its_depth(tokenizer: Tokenizer) -> None:
    task, form = Task(name="needle"), TextForm(tokenizer)
    sentences = {f" {sentence}" for sentence in FILLER}
    for depth in (0.0, 0.5, 1.0):
        document = form.write(task, 3000, random_numbers(0, "test", task, 0), depth)
        text = tokenizer.decode(document.tokens.tolist()).partition("\nQuestion")[0]
        before, needle, after = re.split(r"( The number of \w+ is \d+\.)", text)
        assert needle
        assert len(before) / len(text) == pytest.approx(depth, abs=0.05)
        assert all(f" {part}." in sentences for part in re.findall(r" ([^.]+)\.", before))
        assert after == "" or any(after.startswith(sentence) for sentence in sentences)


def test_no_statement_stands_in_the_gap_before_the_questions(tokenizer: Tokenizer) -> None:
    task, form = Task(name="multi_key", pairs=3, gap=400), TextForm(tokenizer)
    gaps = []
    for number in range(20):
        document = form.write(task, 1200, random_numbers(0, "test", task, number), None)
        haystack, question, _ = tokenizer.decode(document.tokens.tolist()).partition("\nQuestion: ")
        assert question
        gap = re.split(r"The number of \w+ is \d+\.", haystack)[-1]
        gaps.append(len(tokenizer.encode(gap)))
    # Decoding and encoding again may join two tokens where a sentence is cut.
    assert 398 <= min(gaps) < 440


def test_documents_too_short_for_their_sentences_are_refused(tokenizer: Tokenizer) -> None:
    form, task = TextForm(tokenizer), Task(name="multi_key", pairs=8)
    with pytest.raises(UserError, match=r"--lengths 100: 8 statements and 8 questions .* take \d+"):
        form.check(task, 100)
    apart = Task(name="needle", gap=200)
    form.check(Task(name="needle"), 200)
    with pytest.raises(UserError, match=r"of needle, 200 tokens apart, take 2\d\d of"):
        form.check(apart, 200)


def test_the_form_follows_from_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert form_of("auto", tokenizer)[0] == "text"
    Alphabet(64).save_tokenizer(tmp_path / "tokenizer.json")
    name, form = form_of("auto", load_tokenizer(tmp_path / "tokenizer.json"))
    assert name == "tokens"
    assert isinstance(form, TokenForm)
    assert form.chance == 1 / 15
    document = form.write(Task(name="needle"), 50, np.random.default_rng(0), 0.5)
    assert document.tokens.max() < 64
