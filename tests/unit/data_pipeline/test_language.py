"""Languages are told apart without network; unlike ones are never taken for English."""

import gzip
import json
from pathlib import Path

import pytest

from data_pipeline.language import detect_language

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


@pytest.mark.skipif(not SENTENCES.exists(), reason=f"no {SENTENCES}")
def test_english_is_found_and_seldom_seen_elsewhere_in_75_languages() -> None:
    with gzip.open(SENTENCES, "rt") as file:
        rows = [json.loads(line) for line in file]
    found = [(row["lang"] == "en", *detect_language(row["text"])) for row in rows]
    taken = [is_english for is_english, name, p in found if name == "en" and p >= THRESHOLD]
    english = sum(is_english for is_english, _, _ in found)
    assert sum(taken) >= 0.95 * english
    assert len(taken) - sum(taken) <= 0.003 * (len(rows) - english)
