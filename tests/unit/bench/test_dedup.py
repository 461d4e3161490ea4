import random
import re

import pyarrow.parquet as pq
import pytest

from bench.dedup import CHUNK, recall, write_documents
from data_pipeline.dedup import deduplicate


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_planted_pairs_are_as_similar_as_said(tmp_path):
    source = tmp_path / "in.parquet"
    write_documents(source, CHUNK)
    documents = pq.read_table(source).to_pylist()
    planted = [row for row in documents if row["twin"] >= 0]
    assert len(planted) == 0.3 * CHUNK
    for row in random.Random(1).sample(planted, 300):
        a, b = shingles(row["text"]), shingles(documents[row["twin"]]["text"])
        assert len(a & b) / len(a | b) == pytest.approx(row["similarity"])

    deduplicate([source], tmp_path / "out")
    found, expected, wrong = recall(source, tmp_path / "out")
    assert wrong == 0
    assert expected - 0.01 < found < 1
