import re
from itertools import pairwise, product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.dedup.minhash import band_hashes, minhash
from data_pipeline.dedup.shingles import jaccard, shingle_hashes

words = st.sampled_from(
    ["a", "b", "c", "Dd", "été", "İ", "ΟΔΟΣ", "x_1", "東京", "٣", "²", "🦊", "e\u0301"]
)
separators = st.sampled_from([" ", ", ", "\n\n", "-", "\u2028", "'"])
texts = st.lists(st.tuples(words, separators), max_size=14).map(
    lambda pairs: "".join(word + separator for word, separator in pairs)
)


def shingle_strings(text: str, ngram: int) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", text.lower())
    count = max(len(found) - ngram + 1, min(len(found), 1))
    return {tuple(found[i : i + ngram]) for i in range(count)}


@given(batch=st.lists(texts, min_size=1, max_size=6), ngram=st.integers(1, 5))
def test_hashes_are_equal_exactly_where_shingles_are(batch, ngram):
    hashes, first = shingle_hashes(batch, ngram)
    hashed = [set(hashes[a:b].tolist()) for a, b in pairwise(first)]
    strings = [shingle_strings(text, ngram) for text in batch]
    for i, j in product(range(len(batch)), repeat=2):
        assert len(hashed[i] & hashed[j]) == len(strings[i] & strings[j])
    for text, expected in zip(batch, hashed, strict=True):
        alone, _ = shingle_hashes([text], ngram)
        assert set(alone.tolist()) == expected


def test_large_batches_hash_as_their_texts_do_alone():
    random = np.random.default_rng(1)
    sizes = [5, 60_000, 0, 60_000, 3, 60_000, 1]
    batch = [" ".join(map(str, random.integers(0, 10**6, size))) for size in sizes]
    hashes, first = shingle_hashes(batch, 5)
    assert np.diff(first).tolist() == [1, 59_996, 0, 59_996, 1, 59_996, 1]
    for i, text in enumerate(batch):
        assert np.array_equal(shingle_hashes([text], 5)[0], hashes[first[i] : first[i + 1]])


def test_signatures_agree_as_often_as_sets_overlap():
    random = np.random.default_rng(1)
    pool = random.integers(0, 2**64, 3000, np.uint64)
    permutations = 4000
    for shared in (200, 500, 900):
        a, b = pool[:1000], pool[1000 - shared : 2000 - shared]
        expected = jaccard(np.sort(a), np.sort(b))
        assert expected == shared / (2000 - shared)
        signatures = minhash(np.concatenate([a, b]), np.array([0, 1000, 2000]), permutations)
        agreement = (signatures[0] == signatures[1]).mean()
        assert abs(agreement - expected) < 5 * (expected * (1 - expected) / permutations) ** 0.5


def test_bands_agree_exactly_where_their_rows_do():
    signatures = np.arange(24, dtype=np.uint32).reshape(2, 12)
    signatures[1] = signatures[0]
    signatures[1, 5] += 1
    bands = band_hashes(signatures, bands=3, rows=4)
    assert (bands[0] == bands[1]).tolist() == [True, False, True]
    same_rows = band_hashes(np.ones((1, 12), np.uint32), bands=3, rows=4)
    assert len(np.unique(same_rows)) == 3
