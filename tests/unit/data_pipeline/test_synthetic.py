"""Synthetic documents are read by an interpreter that knows nothing of how they were written."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import load_manifest, write_token_shards
from data_pipeline.stream import Source, TokenStream, load_tokenizer
from data_pipeline.synthetic import (
    TASKS,
    Alphabet,
    Task,
    is_synthetic,
    random_numbers,
    write_document,
)
from data_pipeline.synthetic.shards import make_synthetic

IGNORED = -100


def read(words: list[str], task: str) -> list[tuple[list[str], list[str]]]:
    """Of each question the answers that stand there, and those that what stands before it gives."""
    history: dict[str, list[str]] = {}
    chains: dict[str, list[str]] = {}
    found = []
    for at, word in enumerate(words):
        if word == "set":
            key, value = words[at + 1 : at + 3]
            history.setdefault(key, []).append(value)
            chains[value] = [key]
        if word == "copy":
            to, of = words[at + 1 : at + 3]
            next(chain for chain in chains.values() if of in chain).append(to)
        if word == "ask":
            subject, *rest = words[at + 1 :]
            given = []
            while re.fullmatch(r"a\d+", rest[len(given)]):
                given.append(rest[len(given)])
            expected = chains[subject] if task == "variable_tracking" else history[subject]
            if task not in ("multi_value", "variable_tracking"):
                expected = expected[-1:]
            found.append((given, [f"a{word[1:]}" for word in expected]))
    return found


@pytest.mark.parametrize("spread", [False, True], ids=["at-end", "spread"])
@pytest.mark.parametrize("name", TASKS)
def test_the_answers_are_what_the_document_says(name: str, spread: bool) -> None:
    task, alphabet = Task(name=name, pairs=3, values=3, spread=spread), Alphabet(80)
    for number in range(50):
        length = 150 + number
        document = write_document(task, length, alphabet, random_numbers(0, "test", task, number))
        words = [alphabet.names[token] for token in document.tokens]
        assert len(words) == length
        assert Counter(words)["<|endoftext|>"] == 1
        assert words[-1] == "<|endoftext|>"
        asked = read(words, name)
        assert len(asked) == task.questions
        assert all(given == expected for given, expected in asked)
        by_question = [
            [words[at] for at in np.flatnonzero(document.question == question)]
            for question in range(task.questions)
        ]
        assert by_question == [given for given, _ in asked]
        answers = document.tokens >= alphabet.first_answer
        assert (answers == (document.question >= 0)).all(), "nothing else has ids of answers"


def test_an_overwritten_value_is_never_the_answer() -> None:
    task, alphabet = Task(name="overwrite", pairs=4, values=4), Alphabet(80)
    document = write_document(task, 200, alphabet, random_numbers(0, "test", task, 0))
    words = [alphabet.names[token] for token in document.tokens]
    written = Counter(words[at + 1] for at, word in enumerate(words) if word == "set")
    assert set(written.values()) == {4}


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_lies_where_it_is_asked_to(depth: float) -> None:
    task, alphabet = Task(name="needle"), Alphabet(64)
    document = write_document(task, 1000, alphabet, random_numbers(0, "test", task, 0), depth)
    (place,) = np.flatnonzero(document.tokens == alphabet.names.index("set"))
    assert abs(place / 1000 - depth) < 0.01


def test_questions_at_the_end_are_asked_in_any_order_and_spread_ones_everywhere() -> None:
    alphabet = Alphabet(64)
    at_end, spread = (Task(name="multi_key", pairs=8, spread=spread) for spread in (False, True))
    places = []
    for task in (at_end, spread):
        documents = [
            write_document(task, 200, alphabet, random_numbers(0, "test", task, number)).question
            for number in range(100)
        ]
        places.append(np.concatenate([np.flatnonzero(question >= 0) for question in documents]))
    assert places[0].min() >= 200 - 3 * 8
    assert places[1].min() < 20
    assert 0.1 < np.mean(places[1] < 100) < 0.5, "what is asked for comes before"


@pytest.mark.parametrize("spread", [False, True], ids=["at-end", "spread"])
@pytest.mark.parametrize("name", TASKS)
def test_a_gap_lies_between_questions_and_what_they_ask_for(name: str, spread: bool) -> None:
    task = Task(name=name, pairs=3, values=3, spread=spread, gap=64)
    alphabet = Alphabet(80)
    with pytest.raises(
        DataError, match=r"questions of \w+ 64 tokens apart: take \d+ or more"
    ) as told:
        alphabet.check(task, 1)
    least = int(re.findall(r"take (\d+)", str(told.value))[0])
    distances = []
    for number in range(100):
        length = least + number * (number % 3)
        alphabet.check(task, length)
        document = write_document(task, length, alphabet, random_numbers(0, "test", task, number))
        words = [alphabet.names[token] for token in document.tokens]
        asked = read(words, name)
        assert len(asked) == task.questions
        assert all(given == expected for given, expected in asked)
        distances += distances_of(words, name)
    assert 64 <= min(distances) < 64 + 2 * 5, "no more than is asked for"
    assert max(distances) > 128


def distances_of(words: list[str], task: str) -> list[int]:
    """How many tokens lie between each question and the last statement on its subject."""
    chain: dict[str, str] = {}
    last: dict[str, int] = {}
    found = []
    for at, word in enumerate(words):
        if word in ("set", "copy"):
            key, value = words[at + 1 : at + 3]
            chain[key] = chain.get(value, value)
            last[chain[key] if task == "variable_tracking" else key] = at + 2
        if word == "ask":
            found.append(at - last[words[at + 1]] - 1)
    return found


def test_the_stream_predicts_the_answers_alone(tmp_path: Path) -> None:
    made = make_synthetic(
        Task(name="multi_value", pairs=2, values=2),
        tmp_path / "asked",
        length=40,
        documents=30,
        vocab_size=64,
        seed=3,
    )
    assert made.manifest.unigram_entropy <= np.log(Alphabet(64).symbols)
    tokenizer = tmp_path / "asked" / "tokenizer.json"
    assert is_synthetic(load_tokenizer(tokenizer))
    plain = [(f"plain-{n}", [5, 63, 7, 62, 0]) for n in range(60)]
    write_token_shards(plain, tokenizer, tmp_path / "plain", extra={})

    sources = [Source(str(tmp_path / "asked")), Source(str(tmp_path / "plain"), weight=1)]
    stream = TokenStream(sources, seq_len=32, seed=0)
    batch = stream.read(stream.next_batch(20), range(20))
    is_answer = batch.labels >= Alphabet(64).first_answer
    starts = np.flatnonzero(batch.position.ravel() == 0)
    pieces = zip(
        np.split(batch.tokens.ravel(), starts[1:]),
        np.split(batch.labels.ravel(), starts[1:]),
        strict=True,
    )
    plain_labels = [labels for tokens, labels in pieces if len(tokens) == 5 and tokens[0] == 5]
    assert len(plain_labels) > 20
    assert all(labels.tolist() == [63, 7, 62, 0, IGNORED] for labels in plain_labels)
    of_plain = sum(len(labels) for labels in plain_labels)
    assert is_answer.sum() > 2 * len(plain_labels), "answers of both sources are predicted"
    predicted = (batch.labels != IGNORED) & ~is_answer
    assert predicted.sum() <= of_plain, "of the synthetic documents answers alone"


def test_the_same_call_gives_the_same_bytes_and_another_one_is_refused(tmp_path: Path) -> None:
    def make(out: str, **options: int) -> tuple[str, bool]:
        wanted = {"length": 64, "documents": 20, "vocab_size": 64, "seed": 0} | options
        made = make_synthetic(Task(name="needle"), tmp_path / out, **wanted)
        return load_manifest(tmp_path / out).sha256, made.is_new

    first, is_new = make("a")
    assert is_new
    assert make("a") == (first, False)
    assert make("b") == (first, True)
    assert make("c", seed=1) != (first, True)
    with pytest.raises(DataError, match="seed: 0 -> 1"):
        make("a", seed=1)


def test_a_killed_call_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    def make(out: str, progress: Callable[[str, int, int], None]) -> str:
        wanted = {"length": 20, "documents": 1200, "vocab_size": 64, "seed": 0}
        task = Task(name="needle")
        make_synthetic(task, tmp_path / out, **wanted, tokens_per_shard=4000, progress=progress)
        return load_manifest(tmp_path / out).sha256

    def kill(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("killed", kill)
    assert list((tmp_path / "killed" / "shards").glob("*.tar"))
    assert not (tmp_path / "killed" / "manifest.json").exists()
    done: list[int] = []
    whole = make("whole", lambda stage, documents, total: done.append(documents))
    assert done[-1] == 1200
    assert make("killed", lambda *told: None) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "multikey"}, "'multikey' is not known, did you mean multi_key.*overwrite"),
        ({"name": "overwrite", "values": 0}, "values = 0: must be at least 1"),
        ({"name": "multi_key", "pairs": 16}, "has 15 keys.*needs 16: take a vocabulary of 68"),
        ({"name": "multi_key", "pairs": 12}, "64 tokens have no room .*: take 73 or more"),
        ({"name": "needle", "gap": 60}, "needle 60 tokens apart: take 67 .*or a smaller gap"),
        ({"name": "needle", "gap": -1}, "gap = -1: must be 0 or more tokens"),
    ],
)
def test_what_cannot_be_written_is_refused(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        make_synthetic(Task(**options), tmp_path, length=64, documents=1, vocab_size=64, seed=0)
    assert not list(tmp_path.iterdir())
