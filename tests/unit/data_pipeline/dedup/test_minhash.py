import re
import sys
from itertools import pairwise, product

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup.characters import character_table
from data_pipeline.dedup.minhash import minhash, sign
from data_pipeline.dedup.set_kernels import jaccards
from data_pipeline.dedup.shingles import shingle_sets
from data_pipeline.dedup.text_kernels import CASE_IGNORABLE, CASED, LOWER, WORD, WORDS_AT_ONCE

# Characters that lower-casing or word boundaries treat in ways of their own.
words = st.sampled_from(
    ["a", "b", "c", "Dd", "été", "İ", "İz", "ΟΔΟΣ", "Σ", "ΑΣ", "x_1", "東京", "٣", "²", "🦊", "𐐀"]
)
separators = st.sampled_from(
    [" ", ", ", "\n\n", "-", "\u2028", "'", "\u00ad", "", ".", "e\u0301", "\u0345"]
)
texts = st.lists(st.tuples(words, separators), max_size=14).map(
    lambda pairs: "".join(word + separator for word, separator in pairs)
) | st.text(max_size=30)


def shingle_strings(text: str, ngram: int) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    count = max(len(found) - ngram + 1, min(len(found), 1))
    return {tuple(found[i : i + ngram]) for i in range(count)}


def sets_of(batch: list[str], ngram: int) -> list[list[int]]:
    hashes, first = shingle_sets(pa.array(batch, pa.string()), ngram)
    return [hashes[a:b].tolist() for a, b in pairwise(first)]


@settings(deadline=None)  # the first one waits for the compiler
@given(batch=st.lists(texts, min_size=1, max_size=6), ngram=st.integers(1, 5))
def test_hashes_are_equal_exactly_where_shingles_are(batch, ngram):
    hashed = sets_of(batch, ngram)
    strings = [shingle_strings(text, ngram) for text in batch]
    for i, j in product(range(len(batch)), repeat=2):
        assert len({*hashed[i]} & {*hashed[j]}) == len(strings[i] & strings[j])
    for text, expected in zip(batch, hashed, strict=True):
        assert sets_of([text], ngram) == [expected]
        assert expected == sorted({*expected})


@settings(deadline=None)
@given(text=texts)
def test_words_are_those_of_the_lower_cased_text(text):
    # Lower-casing what is lower-cased changes nothing, so that any deviation shows.
    assert sets_of([text], 1) == sets_of([text.lower()], 1)
    assert sets_of([text], 3) == sets_of([" ".join(re.findall(r"\w+", text.lower()))], 3)


def test_every_character_is_lower_cased_and_classed_as_python_does():
    table = character_table()
    for point in range(sys.maxunicode + 1):
        if 0xD800 <= point < 0xE000:
            continue
        character, entry = chr(point), int(table[point])
        lowered = character.lower()
        assert entry & LOWER == ord(lowered[0]), hex(point)
        assert bool(entry & WORD) == (re.match(r"\w", lowered) is not None), hex(point)
        assert len(lowered) == 1 or lowered == "i\u0307"
        cased = f"{character}Σ".lower()[-1] == "ς"
        assert bool(entry & CASED) == cased, hex(point)
        ignorable = not cased and f"a{character}Σ".lower()[-1] == "ς"
        assert bool(entry & CASE_IGNORABLE) == ignorable, hex(point)


def test_slices_of_arrays_are_read_where_they_begin():
    batch = ["no", "one two three", "", "été 東京"]
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        part = pa.array(batch, kind).slice(1, 3)
        hashes, first = shingle_sets(part, 2)
        assert [hashes[a:b].tolist() for a, b in pairwise(first)] == sets_of(batch[1:], 2)


@pytest.mark.parametrize("length", [WORDS_AT_ONCE * n + extra for n in (1, 2) for extra in (-1, 5)])
def test_signatures_of_long_texts_are_the_minima_of_all_their_shingles(length):
    random = np.random.default_rng(length)
    text = " ".join(map(str, random.integers(0, 10**6, length)))
    parts = [" ".join(text.split()[i : i + 5]) for i in range(length - 4)]
    whole, _ = minhash(pa.array([text]), 16, 5)
    each, _ = minhash(pa.array(parts), 16, 5)
    assert np.array_equal(whole[0], each.min(0))


def test_signatures_agree_as_often_as_sets_overlap():
    permutations = 4000
    pool = [f"word{i}" for i in range(3000)]
    for shared in (200, 500, 900):
        batch = [" ".join(pool[:1000]), " ".join(pool[1000 - shared : 2000 - shared])]
        hashes, first = shingle_sets(pa.array(batch), 1)
        expected = shared / (2000 - shared)
        assert jaccards(hashes, first, np.array([0]), np.array([1])) == [expected]
        minima, has_words = minhash(pa.array(batch), permutations, 1)
        assert has_words.all()
        agreement = (minima[0] == minima[1]).mean()
        assert abs(agreement - expected) < 5 * (expected * (1 - expected) / permutations) ** 0.5


def test_bands_agree_exactly_where_their_rows_do():
    random = np.random.default_rng(1)
    batch = [" ".join(map(str, random.integers(0, 12, 40))) for _ in range(200)]
    minima, _ = minhash(pa.array(batch), 12, 2)
    bands, _ = sign(pa.array(batch), bands=4, rows=3, ngram=2)
    for band in range(4):
        _, by_rows = np.unique(minima[:, 3 * band : 3 * band + 3], axis=0, return_inverse=True)
        _, by_hash = np.unique(bands[band], return_inverse=True)
        pairs = np.stack([by_rows.ravel(), by_hash])
        groups = len(np.unique(pairs, axis=1).T)
        assert groups == by_rows.max() + 1 == by_hash.max() + 1 > 20
    alike, _ = sign(pa.array(["", ""]), bands=4, rows=3, ngram=2)
    assert len(np.unique(alike)) == 4
