"""Every rule fires on the text it was written for, and only that rule does."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.quality import Text
from data_pipeline.quality.ngrams import ngram_shares
from data_pipeline.quality.words import has_sentences
from data_pipeline.recipe import Recipe, load_recipe, shipped_recipes
from tests.unit.data_pipeline import plain_quality as plain

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
    assert recipe.gopher_quality.judge(Text(text), "en").reason == reason


def test_stop_words_are_asked_only_of_their_language(recipe: Recipe) -> None:
    assert recipe.gopher_quality is not None
    german = words(60).removeprefix("the be to of ")
    assert recipe.gopher_quality.judge(Text(german), "de").keep


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
    assert strict.judge(Text(PROSE), "en").keep
    assert not strict.judge(Text(text), "en").keep
    others = {
        name: {} if isinstance(value, dict) else 1.0
        for name, value in strict.model_dump().items()
        if name != limit
    }
    assert strict.model_copy(update=others).judge(Text(text), "en").reason == f"gopher.{reason}"


@pytest.mark.parametrize("seed", range(20))
def test_ngram_shares_equal_a_count_by_hand(seed: int) -> None:
    draw = random.Random(seed)
    vocabulary = ["a", "bb", "ccc", "dddd", "é", "語"][: draw.randint(1, 6)]
    text = draw.choices(vocabulary, k=draw.randint(2, 60))
    shares = list(ngram_shares(Text(" ".join(text)).pieces, 10))
    assert [n for n, _, _ in shares] == list(range(2, min(10, len(text)) + 1))
    for n, top, duplicate in shares:
        assert (top, duplicate) == pytest.approx(plain.ngrams(text, n)), n


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
    assert recipe.c4.judge(Text(text), "en").reason == reason


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
    assert recipe.c4.judge(Text("\n".join(text)), "en").document.text == "\n".join(kept)


@pytest.fixture(scope="module")
def fineweb() -> Recipe:
    return load_recipe("fineweb")


def test_fineweb_has_c4_without_terminal_punctuation(fineweb: Recipe) -> None:
    assert fineweb.c4 is not None
    text = f"{PROSE}\nA heading without an end\nNo end"
    assert fineweb.c4.judge(Text(text), "en").document.text.endswith("\nA heading without an end")
    assert "x" * 1001 not in fineweb.c4.judge(Text(f"{PROSE} {'x' * 1001}"), "en").document.text


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (None, PROSE),
        ("punctuated_lines", lines(PROSE, *(words(9, n) for n in range(3, 55)))),
        ("duplicate_line_character_fraction", lines(PROSE, PROSE.split("\n")[0])),
        ("short_lines", lines(PROSE, *(f"{n} is short." for n in range(15)))),
    ],
)
def test_fineweb_rules(fineweb: Recipe, reason: str | None, text: str) -> None:
    assert fineweb.fineweb is not None
    found = fineweb.fineweb.judge(Text(text), "en").reason
    assert found == (reason and f"fineweb.{reason}")


def test_fineweb_drops_at_its_thresholds(fineweb: Recipe) -> None:
    """12 of 100 lines punctuated are too few, 13 are enough; 67 of 100 short ones too many."""
    assert fineweb.fineweb is not None
    long = [f"line {n} of a hundred that all differ" for n in range(100)]
    ends = [f"{line}." for line in long]
    short = [f"{n}." for n in range(100)]

    def reason(*lines: str) -> str | None:
        return fineweb.fineweb and fineweb.fineweb.judge(Text("\n".join(lines)), "en").reason

    assert reason(*ends[:12], *long[12:]) == "fineweb.punctuated_lines"
    assert reason(*ends[:13], *long[13:]) is None
    assert reason(*short[:67], *ends[67:]) == "fineweb.short_lines"
    assert reason(*short[:66], *ends[66:]) is None


LETTERS_AND_SIGNS = """a b c The the of and be to é İ ǅ x1 1 22 ² _ . ... … ! ? # - • * " ” ' ( {
    [1] [edit] [] 語 か ー 々 。 、 ！ ： 𠀀 한국 ไทย 😀 javascript java[1]script U.S. Dr."""
SPACES = [" ", "\n", "\n\n", "\t", "\u00a0", "\u2028", "\x1c", "\x85", "\u3000"]
LONGER = [
    "A sentence of six short words. ",
    "word word word word word ",
    "Use Cookies",
    "lorem ipsum",
    "x" * 30,
    "y" * 1001,
]
PIECES = st.one_of(
    st.sampled_from(LETTERS_AND_SIGNS.split()),
    st.just(" "),
    st.sampled_from([*SPACES, *LONGER, "\u0301", "\ud800"]),
)


@settings(deadline=None)
@given(pieces=st.lists(PIECES, max_size=60), times=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_verdict_is_the_one_of_the_plain_rules(
    pieces: list[str], times: int, seed: int
) -> None:
    text = "".join(pieces) * times
    relaxed = {"min_words": 1 + seed, "min_mean_word_length": 1.5, "min_alphabetic_words": 0.3}
    for name in ("c4-gopher", "fineweb"):
        recipe = load_recipe(name)
        repetition, quality, c4 = recipe.gopher_repetition, recipe.gopher_quality, recipe.c4
        assert repetition is not None
        assert quality is not None
        assert c4 is not None
        quality = quality.model_copy(update=relaxed)
        c4 = c4.model_copy(
            update={
                "min_sentences": seed % 4,
                "min_words_per_line": seed % 5,
                "bad_words": ("Java Script", "x1", "か")[: max(0, seed - 6)],
            }
        )
        document = Text(text)
        expected = next(plain.gopher_repetition(repetition, text), None)
        assert repetition.judge(document, "en").reason == expected
        assert quality.judge(document, "en").reason == next(
            plain.gopher_quality(quality, text, "en"), None
        )
        verdict = c4.judge(document, "en")
        assert (verdict.document.text, verdict.reason) == plain.c4(c4, text)
        if recipe.fineweb is not None:
            assert recipe.fineweb.judge(document, "en").reason == next(
                plain.fineweb(recipe.fineweb, text), None
            )


@settings(deadline=None)
@given(words=st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=80))
def test_shares_of_repeated_lines_and_words_are_exact(words: list[str]) -> None:
    text = Text("\n".join(words))
    assert text.duplicate_lines == pytest.approx(plain.duplicates(words))
    for n, top, repeated in ngram_shares(text.pieces, 10):
        assert (top, repeated) == plain.ngrams(words, n)


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
    assert has_sentences(text, sentences)
    assert not has_sentences(text, sentences + 1)


def test_chinese_and_japanese_texts_can_pass(recipe: Recipe) -> None:
    japanese = "今日は川のそばを歩きながら、古い船と町の人々について考えました。"
    chinese = "今天我沿着河边散步，想起了古老的船只和住在那里的人们。"
    for language, line in (("ja", japanese), ("zh", chinese)):
        text = "\n".join(line.replace("船", ship) for ship in "船舟艇")
        assert recipe.c4 is not None
        assert recipe.gopher_quality is not None
        assert recipe.c4.judge(Text(text), language).document.text == text
        assert recipe.gopher_quality.judge(Text(text), language).keep
        assert recipe.gopher_quality.judge(Text(line), language).reason == "gopher.word_count"


@pytest.mark.parametrize(
    ("entry", "text", "is_dropped"),
    [
        ("guitar", "A guitar, they said.", True),
        ("Guitar", "Two GUITARS and a GUITAR.", True),
        ("guitar", "Two guitars.", False),
        ("two words", "In two\nWords.", True),
        ("two words", "Two other words.", False),
        ("don't", "I don't know.", True),
        ("x-rated", "All of it is X-rated.", True),
        ("不好", "这不好吗", True),
    ],
)
def test_c4_bad_words_are_the_recipes_own(
    recipe: Recipe, entry: str, text: str, is_dropped: bool
) -> None:
    assert recipe.c4 is not None
    relaxed = recipe.c4.model_copy(update={"min_sentences": 0})
    strict = relaxed.model_copy(update={"bad_words": ("another", entry)})
    assert relaxed.judge(Text(text), "en").keep
    assert strict.judge(Text(text), "en").reason == ("c4.bad_words" if is_dropped else None)


def test_later_heuristics_see_the_edited_text(recipe: Recipe) -> None:
    verdict = recipe.judge_quality(Text("A heading without an end\n" + PROSE), "en")
    assert verdict.keep
    assert verdict.document.text.startswith("The ferry")


@pytest.mark.parametrize("name", ["minimal", "c4-gopher", "demo", "fineweb"])
def test_shipped_recipes_load(name: str) -> None:
    assert name in shipped_recipes()
    assert load_recipe(name).description


def test_minimal_judges_nothing() -> None:
    assert load_recipe("minimal").judge_quality(Text("{ }"), "xx").keep


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_words:", "max_wrods:"), "did you mean 'max_words'?"),
        (("dedup:", "dedupe:"), "did you mean 'dedup'?"),
        (("min_words: 50", "min_words: many"), "gopher_quality.min_words = 'many'"),
        (("mode: fast", "mode: quick"), "'fast' or 'accurate'"),
        (("  ngram: 5", ""), "'dedup.ngram' is missing"),
        (("bad_words: []", "bad_words: [foul, '!?']"), "c4.bad_words.1: '!?' has no word"),
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
