"""A text with a long run of an evaluation's words is found, and nothing else is."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.errors import DataError
from data_pipeline.hygiene import decontamination
from data_pipeline.hygiene.decontamination import WORD, Decontamination, Index

QUESTION = (
    "A ferry leaves the northern pier at noon and crosses the lake in forty minutes. "
    "When does it reach the southern pier, if the captain waits for ten minutes?"
)
SHORT = "Which of these lakes is the deepest in Europe?"
TINY = "Is the lake deep?"


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    return path


def read(path: Path, ngram: int = 13, min_words: int = 8) -> Decontamination:
    settings = Decontamination(files=(Path(path.name),), ngram=ngram, min_words=min_words)
    return settings.with_files(path.parent)


@pytest.fixture
def settings(tmp_path: Path) -> Decontamination:
    return read(write(tmp_path / "lakes.jsonl", ["of no use", QUESTION, SHORT, TINY]))


def test_the_overlap_is_shown_with_its_example(settings: Decontamination) -> None:
    text = f"Homework: {QUESTION.upper().replace(' ', '  ').replace(',', ' -')} Please help!"
    finding = settings.judge(text)
    assert finding is not None
    assert finding.reason == "decontamination.overlap"
    assert finding.detail == (
        "29 words of example 1 (counted from 0) of lakes.jsonl: "
        + " ".join(re.findall(r"\w+", QUESTION.lower()))
    )


def test_thirteen_words_are_enough_and_twelve_are_not(settings: Decontamination) -> None:
    words = QUESTION.split()
    for place in range(len(words) - 12):
        assert settings.judge(f"so {' '.join(words[place : place + 13])} or") is not None
        assert settings.judge(f"so {' '.join(words[place : place + 12])} or") is None
    assert settings.judge(" ".join([*words[:12], "twice", *words[12:]])) is not None
    assert settings.judge(" ".join([*words[:12], "twice", *words[12:24]])) is None


def test_a_short_example_counts_with_all_its_words(settings: Decontamination) -> None:
    finding = settings.judge(f"Quiz. {SHORT} Tell us.")
    assert finding is not None
    assert finding.detail.startswith("9 words of example 2 ")
    assert settings.judge(SHORT.replace("deepest", "largest")) is None
    assert settings.judge(f"{TINY} {TINY} {TINY} {TINY}") is None


def test_every_chinese_character_is_a_word(tmp_path: Path) -> None:
    settings = read(write(tmp_path / "zh.jsonl", ["北京是中华人民共和国的首都和政治中心"]))
    assert settings.judge("大家知道，中华人民共和国的首都和政治是") is not None
    assert settings.judge("大家知道，中华人民共和国的首都和") is None


vocabulary = st.sampled_from(["a", "B", "ab", "é", "Σ", "İ", "語", "語語", "_", "1"])


@given(
    examples=st.lists(st.lists(vocabulary, max_size=8), min_size=1, max_size=3),
    document=st.lists(vocabulary, max_size=30),
)
def test_it_agrees_with_comparing_all_words(examples: list[list[str]], document: list[str]) -> None:
    texts = [", ".join(example) for example in examples]
    text = " ".join(document)
    words = WORD.findall(text.lower())
    expected = False
    for example in (WORD.findall(text.lower()) for text in texts):
        size = min(4, len(example))
        ngrams = {tuple(example[i : i + size]) for i in range(len(example) - size + 1)}
        runs = {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
        expected |= size >= 2 and not ngrams.isdisjoint(runs)
    found = Index(texts, texts, ngram=4, min_words=2).find(text)
    assert (found is not None) == expected
    if found is not None:
        assert "\n".join(found.words) in "\n".join(WORD.findall(found.example.lower()))


def test_equal_hashes_of_other_words_are_not_an_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    hash_words = decontamination._hash_words

    def of_few_values(codes: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        return np.asarray(hash_words(codes, kinds) % np.uint64(2))

    monkeypatch.setattr(decontamination, "_hash_words", of_few_values)
    draw = random.Random(1)
    example = " ".join(draw.choices("abcd", k=40))
    index = Index([example], ["it"], ngram=6, min_words=6)
    other = " ".join(draw.choices("efgh", k=400))
    assert index.find(other) is None
    assert index.find(f"{other} {example[:11]}") is not None


@pytest.mark.parametrize("name", ["set.parquet", "set.jsonl.gz"])
def test_other_file_types_hold_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [None, QUESTION]}), path)
    else:
        with pa.output_stream(str(path), compression="gzip") as file:
            file.write(json.dumps({"text": QUESTION}).encode() + b"\n")
    finding = read(path).judge(QUESTION)
    assert finding is not None
    assert f"of {name}: a ferry" in finding.detail


def test_files_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": [QUESTION]}), tmp_path / "set.parquet")
    (tmp_path / "set.txt").write_text(QUESTION)
    (tmp_path / "other.parquet").write_text(QUESTION)
    (tmp_path / "other.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")
    (tmp_path / "list.jsonl").write_text(f'{{"text": "a"}}\n["{QUESTION}"]\n')
    (tmp_path / "number.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    for name, message in {
        "set.parquet": "set.parquet: no column `text` among question",
        "set.txt": "set.txt: unknown file type; allowed are .parquet, .jsonl",
        "other.parquet": "other.parquet: damaged or not Parquet",
        "other.jsonl": "other.jsonl: no text of at least 8 words; is it in `text`?",
        "list.jsonl": "list.jsonl:2: not a JSON object",
        "number.jsonl": "number.jsonl:1: `text` must be a string, not 1",
        "cut.jsonl.gz": "cut.jsonl.gz: damaged after line 0",
        "gone.jsonl": "gone.jsonl: No such file",
    }.items():
        with pytest.raises(DataError, match=re.escape(message)):
            read(tmp_path / name)


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_words 14 and ngram 13 are impossible"):
        Decontamination(ngram=13, min_words=14)
