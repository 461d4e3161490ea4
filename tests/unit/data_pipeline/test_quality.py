"""Every rule fires on the text it was written for, and only that rule does."""

import random
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.quality.gopher import ngram_shares
from data_pipeline.quality.words import count_sentences
from data_pipeline.recipe import Recipe, load_recipe, shipped_recipes

PROSE = """\
The ferry that crosses the river leaves from the old pier every morning at seven.
Most of its passengers work in the shipyard on the other side and have done so for years.
They stand at the rail, drink coffee from paper cups and talk about the weather.

In winter the crossing takes longer, because ice drifts down from the lakes in the north.
The captain knows each sandbank and slows the engine long before the water turns shallow.
Once, she said, a storm kept the boat at anchor for two days while everyone waited on board.

Nobody remembers that time as a hardship; there was soup, and someone had brought a guitar."""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("c4-gopher")


def words(count: int, length: int = 5) -> str:
    """Random words that stop-word and repetition rules have nothing against."""
    draw = random.Random(count + length)
    some = ["".join(draw.choices("abcdefghij", k=length)) for _ in range(count)]
    return "the be to of " + " ".join(some)


def lines(*texts: str) -> str:
    return "\n".join(texts)


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (None, PROSE),
        ("gopher.word_count", words(45)),
        ("gopher.word_count", words(100_000)),
        ("gopher.mean_word_length", words(60, 12)),
        ("gopher.mean_word_length", words(200, 2)),
        ("gopher.symbol_to_word_ratio", PROSE + " #" * 20),
        ("gopher.symbol_to_word_ratio", PROSE.replace(" the ", " … the... ").replace(" a ", "…")),
        ("gopher.bullet_lines", lines(*(f"• {words(9, n)}" for n in range(3, 10)))),
        ("gopher.ellipsis_lines", lines(*(f"{words(40, n)}..." for n in range(3, 10)))),
        ("gopher.alphabetic_words", lines(PROSE, *(f"{n}{n + 1}" for n in range(100, 150)))),
        ("gopher.stop_words", words(60).removeprefix("the be to of ")),
    ],
)
def test_gopher_quality(recipe: Recipe, reason: str | None, text: str) -> None:
    assert recipe.gopher_quality is not None
    assert recipe.gopher_quality.judge(text, "en").reason == reason


def test_stop_words_are_asked_only_of_their_language(recipe: Recipe) -> None:
    assert recipe.gopher_quality is not None
    german = words(60).removeprefix("the be to of ")
    assert recipe.gopher_quality.judge(german, "de").keep


def repeats(text: str, times: int, separator: str) -> str:
    return separator.join([words(30, 7), *[text] * times, words(30, 8)])


@pytest.mark.parametrize(
    ("limit", "reason", "text"),
    [
        ("max_duplicate_lines", "duplicate_line_fraction", repeats("ok", 3, "\n")),
        (
            "max_duplicate_line_characters",
            "duplicate_line_character_fraction",
            repeats(words(40), 2, "\n"),
        ),
        ("max_duplicate_paragraphs", "duplicate_paragraph_fraction", repeats("a b", 3, "\n\n")),
        (
            "max_duplicate_paragraph_characters",
            "duplicate_paragraph_character_fraction",
            repeats(words(40), 2, "\n\n"),
        ),
        (
            "max_top_ngrams",
            "top_2_gram_character_fraction",
            " ".join(f"{word} extraordinarily long" for word in words(40, 3).split()),
        ),
        (
            "max_duplicate_ngrams",
            "duplicate_5_gram_character_fraction",
            f"{words(50)} {words(20, 6)} {words(20, 6)}",
        ),
    ],
)
def test_gopher_repetition(recipe: Recipe, limit: str, reason: str, text: str) -> None:
    """Each limit by itself: a text that repeats paragraphs also repeats lines and n-grams."""
    strict = recipe.gopher_repetition
    assert strict is not None
    assert strict.judge(PROSE, "en").keep
    assert not strict.judge(text, "en").keep
    others = {
        name: {} if isinstance(value, dict) else 1.0
        for name, value in strict.model_dump().items()
        if name != limit
    }
    assert strict.model_copy(update=others).judge(text, "en").reason == f"gopher.{reason}"


def reference_shares(words: list[str], n: int) -> tuple[float, float]:
    """Table A1's two shares, word by word."""
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    total = sum(map(len, words))
    most = max(Counter(grams).values())
    if most == 1:
        return 0.0, 0.0
    top = max(most * sum(map(len, gram)) for gram, count in Counter(grams).items() if count == most)
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for start, gram in enumerate(grams):
        if gram in seen:
            covered.update(range(start, start + n))
        seen.add(gram)
    return top / total, sum(len(words[position]) for position in covered) / total


@pytest.mark.parametrize("seed", range(20))
def test_ngram_shares_equal_a_count_by_hand(seed: int) -> None:
    draw = random.Random(seed)
    vocabulary = ["a", "bb", "ccc", "dddd", "é", "語"][: draw.randint(1, 6)]
    text = draw.choices(vocabulary, k=draw.randint(2, 60))
    shares = list(ngram_shares(text, 10))
    assert [n for n, _, _ in shares] == list(range(2, min(10, len(text)) + 1))
    for n, top, duplicate in shares:
        assert (top, duplicate) == pytest.approx(reference_shares(text, n)), n


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (None, PROSE),
        ("c4.lorem_ipsum", PROSE + "\nLorem Ipsum dolor sit amet."),
        ("c4.curly_bracket", PROSE + "\nif (x) { return; }"),
        ("c4.sentences", "\n".join(PROSE.split("\n")[:2])),
        ("c4.sentences", PROSE.replace(".", "")),
    ],
)
def test_c4_pages(recipe: Recipe, reason: str | None, text: str) -> None:
    assert recipe.c4 is not None
    assert recipe.c4.judge(text, "en").reason == reason


def test_c4_drops_lines_and_citations(recipe: Recipe) -> None:
    assert recipe.c4 is not None
    kept = [
        "The river rises in spring.",
        'Then she said "never on Sundays".',
        "Is it very deep here?",
    ]
    text = [
        "Home page of the river",
        kept[0].replace("spring", "spring[12]"),
        "Too few words.",
        "And then the story goes on...",
        "Please enable JavaScript to see the map.",
        kept[1],
        "By reading on you accept our privacy policy.",
        kept[2] + "[citation needed]",
        "",
    ]
    assert recipe.c4.judge("\n".join(text), "en").text == "\n".join(kept)


@pytest.mark.parametrize(
    ("sentences", "text"),
    [
        (1, "Ask Dr. Smith of the U.S. Navy for tools, e.g. Ropes or J. S. Bach."),
        (3, 'It rained. "Really?" She laughed!'),
        (2, "It rose by 3.5 m. to 7. Then it fell.\n"),
        (2, "Он ушёл. Она осталась."),
        (2, "川です。船です。"),
        (0, "no end"),
    ],
)
def test_sentences_are_counted_by_their_ends(sentences: int, text: str) -> None:
    assert count_sentences(text) == sentences


def test_chinese_and_japanese_texts_can_pass(recipe: Recipe) -> None:
    japanese = "今日は川のそばを歩きながら、古い船と町の人々について考えました。"
    chinese = "今天我沿着河边散步，想起了古老的船只和住在那里的人们。"
    for language, line in (("ja", japanese), ("zh", chinese)):
        text = "\n".join(line.replace("船", ship) for ship in "船舟艇")
        assert recipe.c4 is not None
        assert recipe.gopher_quality is not None
        assert recipe.c4.judge(text, language).text == text
        assert recipe.gopher_quality.judge(text, language).keep
        assert recipe.gopher_quality.judge(line, language).reason == "gopher.word_count"


def test_c4_bad_words_are_the_recipes_own(recipe: Recipe) -> None:
    assert recipe.c4 is not None
    strict = recipe.c4.model_copy(update={"bad_words": ("guitar",)})
    assert strict.judge(PROSE, "en").reason == "c4.bad_words"


def test_later_heuristics_see_the_edited_text(recipe: Recipe) -> None:
    verdict = recipe.judge_quality("A heading without an end\n" + PROSE, "en")
    assert verdict.keep
    assert verdict.text.startswith("The ferry")


@pytest.mark.parametrize("name", ["minimal", "c4-gopher", "demo"])
def test_shipped_recipes_load(name: str) -> None:
    assert name in shipped_recipes()
    assert load_recipe(name).description


def test_minimal_judges_nothing() -> None:
    assert load_recipe("minimal").judge_quality("{ }", "xx").keep


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_words:", "max_wrods:"), "did you mean 'max_words'?"),
        (("dedup:", "dedupe:"), "did you mean 'dedup'?"),
        (("min_words: 50", "min_words: many"), "gopher_quality.min_words = 'many'"),
        (("mode: fast", "mode: quick"), "'fast' or 'accurate'"),
        (("  ngram: 5", ""), "'dedup.ngram' is missing"),
    ],
)
def test_a_wrong_setting_is_named_with_its_neighbour(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    shipped = Path(__file__).parents[3] / "data_pipeline" / "recipes" / "c4-gopher.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped.read_text().replace(*change))
    with pytest.raises(DataError, match=r"mine\.yaml") as error:
        load_recipe(str(mine))
    assert message in str(error.value)


def test_an_unknown_recipe_is_refused_with_the_shipped_ones() -> None:
    with pytest.raises(DataError, match=r"did you mean 'c4-gopher'.*minimal"):
        load_recipe("c4gopher")
