"""Recall from the threshold on, on pairs of documents whose similarity is known."""

import itertools
import json
import random
from collections import Counter

import pyarrow.parquet as pq
import pytest

from data_pipeline.dedup import deduplicate
from data_pipeline.dedup.minhash import candidate_probability, choose_bands


def make_pairs(threshold):
    """300 pairs of documents whose similarities spread evenly around `threshold`.

    Words do not repeat within a pair, so two texts that begin with the same words and go on with
    words of their own have a similarity known from the lengths alone.
    """
    rng = random.Random(11)
    names = (f"word{i}" for i in itertools.count())
    corpus, similarity = [], {}
    for pair in range(300):
        wanted = threshold + rng.uniform(-0.1, 0.15)
        length = 200
        shared = round(2 * length * wanted / (1 + wanted))
        start = list(itertools.islice(names, shared + 4))
        texts = [start + list(itertools.islice(names, length - shared)) for _ in range(2)]
        for side, words in zip("ab", texts, strict=True):
            corpus.append({"id": f"{pair}{side}", "text": " ".join(words)})
        similarity[pair] = shared / (2 * length - shared)
    return corpus, similarity


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8])
def test_pairs_from_the_threshold_on_are_found(tmp_path, threshold):
    corpus, similarity = make_pairs(threshold)
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in corpus))
    deduplicate([path], tmp_path / "out", threshold=threshold)
    rows = pq.read_table(tmp_path / "out/clusters.parquet").to_pylist()
    cluster = {row["id"]: row["cluster"] for row in rows}
    sizes = Counter(cluster.values())
    joined = {pair for pair in similarity if cluster[f"{pair}a"] == cluster[f"{pair}b"]}
    similar = {pair for pair, value in similarity.items() if value >= threshold}
    assert len(similar) > 150
    assert joined <= similar
    bands, rows = choose_bands(threshold)
    chances = [candidate_probability(similarity[pair], bands, rows) for pair in similar]
    spread = sum(chance * (1 - chance) for chance in chances) ** 0.5
    assert 0.97 * len(similar) < sum(chances) < len(joined) + 3 * spread
    assert max(sizes.values()) == 2
