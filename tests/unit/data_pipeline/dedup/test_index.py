"""An index of dumps gives what one deduplication of all their files gives."""

import gzip
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.dedup import deduplicate
from data_pipeline.dedup.index import (
    checked_settings,
    deduplicate_with_index,
    export_clusters,
    remove_documents,
)
from data_pipeline.dedup.index.batches import write_segments
from tests.unit.data_pipeline.dedup.corpus import (
    clusters_of,
    documents_of,
    make_corpus,
    write_jsonl,
)

SHARED = Path(__file__).parents[5] / "shared"
MEMORY = 1 << 20
WORDS = [f"w{i}" for i in range(30)]
BASES = [random.Random(seed).choices(WORDS, k=length) for seed, length in enumerate([25, 12, 4])]


@pytest.fixture(autouse=True)
def no_power_is_lost(monkeypatch):
    """Waiting for a busy disk takes longer than all else; a process that is killed needs it not."""
    monkeypatch.setattr("os.fsync", lambda file: None)


def outcome(rows):
    """What became of each document, with clusters numbered as they come."""
    numbers = {}
    return [
        (
            row["id"],
            numbers.setdefault(row["cluster"], len(numbers)),
            *(row[name] for name in ("kept", "exact", "twin", "jaccard")),
        )
        for row in rows
    ]


class Dumps:
    """An index, and one run over everything that should be in it."""

    def __init__(self, folder, keep="longest", threshold=0.8, ngram=5):
        self.folder = folder
        self.settings = {"keep": keep, "threshold": threshold, "ngram": ngram}
        self.documents = []
        self.kept = set()

    def add(self, documents):
        before = self.kept
        source = write_jsonl(self.folder / "dump.jsonl", documents)
        checked = checked_settings(bands=None, rows=None, **self.settings)
        out = self.folder / "out"
        report = deduplicate_with_index([source], out, self.folder / "ix", checked, memory=MEMORY)
        self.documents += documents
        self.check()
        new = {document["id"] for document in documents}
        rows = clusters_of(out)
        assert [row["id"] for row in rows] == [document["id"] for document in documents]
        kept = [row["id"] for row in rows if row["kept"]]
        assert [row["id"] for row in documents_of(out)] == kept
        assert set(kept) == self.kept & new
        superseded = pq.read_table(out / "superseded.parquet").to_pylist()
        assert {row["id"] for row in superseded} == before - self.kept
        assert report.is_new
        assert (report.documents, report.kept, report.superseded) == (
            len(documents),
            len(kept),
            len(superseded),
        )
        return report

    def remove(self, ids):
        before = self.kept
        changes = self.folder / "changes.parquet"
        report = remove_documents(self.folder / "ix", ids, changes, memory=MEMORY)
        self.documents = [document for document in self.documents if document["id"] not in ids]
        self.check()
        rows = {row["id"]: row["kept"] for row in pq.read_table(changes).to_pylist()}
        assert rows == {name: name in self.kept for name in (before ^ self.kept) - set(ids)}
        assert (report.removed, report.changed) == (len(set(ids)), len(rows))
        return rows

    def check(self):
        """The index has what one run over all documents gives."""
        table, whole = self.folder / "all.parquet", self.folder / "whole.jsonl"
        assert export_clusters(self.folder / "ix", table) == len(self.documents)
        deduplicate([write_jsonl(whole, self.documents)], self.folder / "whole", **self.settings)
        rows = pq.read_table(table).to_pylist()
        assert outcome(rows) == outcome(clusters_of(self.folder / "whole"))
        self.kept = {row["id"] for row in rows if row["kept"]}


@pytest.mark.parametrize("keep", ["longest", "newest", "first"])
def test_dumps_one_by_one_give_what_one_run_gives(tmp_path, keep):
    corpus = make_corpus(seed=3)
    rng = random.Random(1)
    for document in corpus:
        document["timestamp"] = f"2024-01-{rng.randint(1, 28):02}T00:00:00Z"
    dumps = Dumps(tmp_path, keep)
    reports = [dumps.add(corpus[start : start + 30]) for start in range(0, len(corpus), 30)]
    assert sum(report.superseded for report in reports) > 0 or keep == "first"
    assert sum(report.near_duplicates for report in reports[1:]) > 10


def edited(base, edits, blank):
    words = list(BASES[base])
    for place, word in edits:
        words[place % len(words)] = word
    return "" if blank == 0 else " ".join(words)


TEXTS = st.builds(
    edited,
    st.integers(0, len(BASES) - 1),
    st.lists(st.tuples(st.integers(0, 24), st.sampled_from(WORDS)), max_size=2),
    st.integers(0, 20),
)


@given(
    texts=st.lists(TEXTS, min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 59), max_size=3, unique=True),
    keep=st.sampled_from(["longest", "newest", "first"]),
    most=st.sampled_from([1, 2, 256]),
    rows=st.sampled_from([3, 1000]),
    small=st.booleans(),
    data=st.data(),
)
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_any_dumps_and_removals_give_what_one_run_gives(
    tmp_path_factory, texts, cuts, keep, most, rows, small, data
):
    corpus = [
        {"id": str(i), "text": text, "timestamp": f"2024-01-{1 + i * 7 % 28:02}T00:00:00Z"}
        for i, text in enumerate(texts)
    ]
    bounds = sorted({0, len(corpus), *(cut for cut in cuts if cut < len(corpus))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.dedup.clusters.MOST_COMPARISONS", most)
        patch.setattr("data_pipeline.dedup.batches.ROWS_PER_BATCH", rows)
        if small:  # segments of a few documents, and a few rows and shingles at a time
            for name in ("DOCUMENT", "SHINGLE", "ROW"):
                patch.setattr(f"data_pipeline.dedup.index.limits.BYTES_PER_{name}", 50_000)
            for module in ("columns", "state"):
                patch.setattr(f"data_pipeline.dedup.index.{module}.ROWS_AT_ONCE", 20)
        dumps = Dumps(tmp_path_factory.mktemp("dumps"), keep, threshold=0.6, ngram=2)
        for start, stop in pairwise(bounds):
            dumps.add(corpus[start:stop])
            names = [document["id"] for document in dumps.documents]
            gone = data.draw(st.sets(st.sampled_from(names), max_size=4)) if names else set()
            if gone:
                dumps.remove(gone)


def test_a_longer_document_joins_and_supersedes_clusters_of_earlier_dumps(tmp_path):
    words = [f"word{i}" for i in range(100)]
    texts = {"left": words[:90], "right": words[10:], "bridge": words}
    left, right, bridge = ({"id": name, "text": " ".join(text)} for name, text in texts.items())
    dumps = Dumps(tmp_path, threshold=0.85, ngram=1)
    dumps.add([left, right])
    assert dumps.kept == {"left", "right"}
    dumps.add([bridge])
    assert dumps.kept == {"bridge"}
    rows = pq.read_table(tmp_path / "out/superseded.parquet").to_pylist()
    assert [(row["id"], row["dump"], row["twin"]) for row in rows] == [
        ("left", 0, "bridge"),
        ("right", 0, "bridge"),
    ]
    assert dumps.remove({"bridge"}) == {"left": True, "right": True}


def test_a_removed_document_makes_room_for_its_copy(tmp_path):
    text = " ".join(WORDS)
    dumps = Dumps(tmp_path)
    dumps.add([{"id": "first", "text": text}, {"id": "other", "text": "entirely another one"}])
    assert dumps.remove({"first"}) == {}
    dumps.add([{"id": "copy", "text": text}])
    assert dumps.kept == {"other", "copy"}
    dumps.add([{"id": "first", "text": f"{text} w29"}])
    assert dumps.kept == {"other", "first"}
    assert dumps.remove({"first"}) == {"copy": True}
    stored = b"".join(path.read_bytes() for path in (tmp_path / "ix").rglob("*-*/*"))
    assert b"copy" in stored
    assert b"first" not in stored


@pytest.mark.skipif(not (SHARED / "tools").is_dir(), reason="needs ../shared (real pages)")
def test_four_dumps_of_real_pages_give_what_one_run_gives(tmp_path):
    subprocess.run(
        [
            *(sys.executable, SHARED / "tools/make_crawl.py"),
            *("--pages", SHARED / "data/pages-dev.warc.gz", "--dumps", "4"),
            *("--out", tmp_path / "crawl", "--seed", "2", "--docs", "300"),
        ],
        check=True,
        capture_output=True,
    )
    with gzip.open(tmp_path / "crawl/docs.jsonl.gz", "rt") as lines:
        documents = [json.loads(line) for line in lines]
    dumps = Dumps(tmp_path)
    for number in sorted({document["dump"] for document in documents}):
        report = dumps.add([row for row in documents if row["dump"] == number])
    assert report.dump == 3
    assert report.near_duplicates > 5
    dumps.remove({document["id"] for document in documents[::50]})


@pytest.mark.parametrize("keep", ["longest", "first"])
def test_within_a_memory_the_outcome_is_the_same(tmp_path, monkeypatch, keep):
    batches = []

    def counted(*arguments):
        for segment in write_segments(*arguments):
            batches.append(segment.documents)
            yield segment

    monkeypatch.setattr("data_pipeline.dedup.index.add.write_segments", counted)
    monkeypatch.setattr("data_pipeline.dedup.index.limits.BYTES_PER_DOCUMENT", 10_000)
    monkeypatch.setattr("data_pipeline.dedup.batches.ROWS_PER_BATCH", 10)
    corpus = make_corpus(seed=4)
    source = write_jsonl(tmp_path / "corpus.jsonl", corpus)
    report = deduplicate([source], tmp_path / "all", keep=keep)
    assert deduplicate([source], tmp_path / "little", keep=keep, memory=MEMORY) == report
    assert report.near_duplicates > 10
    assert len(batches) > 2
    assert clusters_of(tmp_path / "little") == clusters_of(tmp_path / "all")
    assert documents_of(tmp_path / "little") == documents_of(tmp_path / "all")
    names = {path.name for path in (tmp_path / "little").iterdir()}
    assert names == {"documents", "clusters.parquet"}
