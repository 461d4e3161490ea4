"""Which documents are duplicates, and which of them is kept."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.dedup import DedupReport, deduplicate
from data_pipeline.dedup.clusters import join_buckets
from data_pipeline.dedup.repeated_units import RepeatedUnits
from data_pipeline.errors import DataError
from tests.unit.data_pipeline.dedup.corpus import (
    clusters_of,
    documents_of,
    exact_jaccard,
    make_corpus,
    true_components,
    write_jsonl,
)


@pytest.mark.parametrize("threshold", [0.7, 0.85])
def test_clusters_are_the_components_of_true_similarity(tmp_path, threshold):
    corpus = make_corpus(seed=3)
    # 40 bands of 4 find a pair of similarity 0.7 with probability 1 - 2e-5.
    report = deduplicate(
        [write_jsonl(tmp_path / "in.jsonl", corpus)],
        tmp_path / "out",
        threshold=threshold,
        bands=40,
        rows=4,
    )
    rows = clusters_of(tmp_path / "out")
    found = {}
    for row in rows:
        found.setdefault(row["cluster"], set()).add(row["id"])
    assert {frozenset(members) for members in found.values()} == true_components(corpus, threshold)
    assert report.kept == len(found)
    assert report.clusters == sum(len(members) > 1 for members in found.values()) > 10

    text = {document["id"]: document["text"] for document in corpus}
    place = {document["id"]: i for i, document in enumerate(corpus)}
    for row in rows:
        if row["kept"]:
            members = found[row["cluster"]]
            best = min(members, key=lambda name: (-len(text[name]), place[name]))
            assert row == {**row, "id": best, "twin": None, "jaccard": None}
        else:
            twin = next(r for r in rows if r["id"] == row["twin"])
            assert twin["kept"]
            assert twin["cluster"] == row["cluster"]
            assert row["jaccard"] == pytest.approx(
                exact_jaccard(text[row["id"]], text[row["twin"]])
            )
        assert row["exact"] == (text[row["id"]] == text.get(row["twin"]))
    kept = [document["id"] for document, row in zip(corpus, rows, strict=True) if row["kept"]]
    documents = documents_of(tmp_path / "out")
    assert [document["id"] for document in documents] == kept
    assert all(document["text"] == text[document["id"]] for document in documents)


def test_workers_files_and_pieces_do_not_change_the_outcome(tmp_path, monkeypatch):
    corpus = make_corpus(seed=4)
    whole = write_jsonl(tmp_path / "whole.jsonl", corpus)
    plain = write_jsonl(tmp_path / "1.jsonl", corpus[:30])
    zipped, zstd = tmp_path / "2.jsonl.gz", tmp_path / "3.jsonl.zst"
    lines = [json.dumps(document) + "\n" for document in corpus]
    zipped.write_bytes(gzip.compress("".join(lines[30:60]).encode()))
    frames = ["".join(lines[60:70]), "".join(lines[70:80])]
    zstd.write_bytes(b"".join(zstandard.compress(frame.encode()) for frame in frames))
    parquet = tmp_path / "4[a].parquet"
    schema = pa.schema([(name, pa.large_string()) for name in ("id", "text", "extra")])
    rows = [{**row, "extra": json.dumps({"n": row["n"]})} for row in corpus[80:]]
    pq.write_table(pa.Table.from_pylist(rows, schema), parquet, row_group_size=7)

    one = deduplicate([whole], tmp_path / "one")
    # Little is in memory at a time, so that there are many pieces.
    monkeypatch.setattr("data_pipeline.dedup.batches.ROWS_PER_BATCH", 3)
    monkeypatch.setattr("data_pipeline.dedup.clusters.SHINGLES_AT_ONCE", 300)
    two = deduplicate([plain, zipped, zstd, parquet], tmp_path / "two", workers=2)
    assert one == two
    assert clusters_of(tmp_path / "one") == clusters_of(tmp_path / "two")
    assert documents_of(tmp_path / "one") == documents_of(tmp_path / "two")


def test_blank_texts_match_nothing_and_short_ones_match_whole(tmp_path):
    texts = [
        "",
        "",
        " \n",
        " \n",
        "!!!",
        "!!!",
        "only three words",
        "Only, three words!",
        "three words",
    ]
    corpus = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    report = deduplicate([write_jsonl(tmp_path / "in.jsonl", corpus)], tmp_path / "out")
    assert [row["twin"] for row in clusters_of(tmp_path / "out")] == [
        *[None] * 5, "4", "7", None, None
    ]  # fmt: skip
    exact = [row["id"] for row in clusters_of(tmp_path / "out") if row["exact"]]
    assert exact == ["5"]
    assert report == DedupReport(
        documents=9, kept=7, exact_duplicates=1, near_duplicates=1, clusters=2
    )


def count_comparisons(tmp_path, monkeypatch, corpus):
    counts = []

    def count(*arguments):
        counts.append(join_buckets(*arguments))

    monkeypatch.setattr("data_pipeline.dedup.clusters.join_buckets", count)
    report = deduplicate([write_jsonl(tmp_path / "in.jsonl", corpus)], tmp_path / "out")
    return report, sum(counts)


def test_near_identical_documents_take_linearly_many_comparisons(tmp_path, monkeypatch):
    rng = random.Random(7)
    base = [f"word{i}" for i in range(150)]
    corpus = []
    for i in range(3000):
        words = list(base)
        words[rng.randrange(len(words))] = f"other{i}"
        corpus.append({"id": str(i), "text": " ".join(words)})
    report, compared = count_comparisons(tmp_path, monkeypatch, corpus)
    assert (report.kept, report.near_duplicates) == (1, 2999)
    assert compared < 10 * len(corpus)


def test_pages_of_one_template_take_boundedly_many_comparisons(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.dedup.clusters.MOST_COMPARISONS", 5)
    template = " ".join(f"word{i}" for i in range(150))
    corpus = [
        {"id": str(i), "text": f"{template} {' '.join(f'own{i}x{k}' for k in range(40))}"}
        for i in range(1000)
    ]
    assert exact_jaccard(corpus[0]["text"], corpus[1]["text"]) == pytest.approx(0.646, abs=1e-3)
    report, compared = count_comparisons(tmp_path, monkeypatch, corpus)
    assert report.kept == len(corpus)
    assert len(corpus) < compared <= 5 * 14 * len(corpus)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(DataError, match="threshold=0 is not allowed"):
        deduplicate([], tmp_path, threshold=0)
    with pytest.raises(DataError, match="bands=0 is not allowed"):
        deduplicate([], tmp_path, bands=0, rows=8)
    with pytest.raises(DataError, match="bands=14 with rows=None is not allowed: give both"):
        deduplicate([], tmp_path, bands=14)
    with pytest.raises(DataError, match=r"threshold=0\.001 is too low .* at least 0\.012"):
        deduplicate([], tmp_path, threshold=0.001)
    message = r"bands=14, rows=8 would miss 95% .* threshold=0\.5; bands=64, rows=4 would do"
    with pytest.raises(DataError, match=message):
        deduplicate([], tmp_path, threshold=0.5, bands=14, rows=8)


def test_impossible_choices_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"exact=word is not allowed; .* document, paragraph, line"):
        deduplicate([], tmp_path, exact="word")
    with pytest.raises(DataError, match=r"keep=best is not allowed; .* longest, newest, first"):
        deduplicate([], tmp_path, keep="best")


TIMES = ["2024-03-02T00:00:00Z", "2024-03-01T23:00:00-03:00", "2024-03-02T01:59:59.5Z"]
WORDS = "one two three four five six seven eight nine ten"


def dated(times):
    texts = [f"{WORDS} and more of it", WORDS, WORDS.upper()]
    return [
        {"id": str(i), "text": text, "timestamp": time}
        for i, (text, time) in enumerate(zip(texts, times, strict=True))
    ]


@pytest.mark.parametrize(("keep", "best"), [("longest", "0"), ("newest", "1"), ("first", "0")])
def test_one_document_of_a_cluster_is_kept_by_the_policy(tmp_path, keep, best):
    corpus = dated(TIMES)
    as_times = pa.array([0, 7200, 7199], pa.timestamp("s"))
    table = pa.Table.from_pylist(corpus)
    files = [
        write_jsonl(tmp_path / "in.jsonl", corpus),
        tmp_path / "a.parquet",
        tmp_path / "b.parquet",
    ]
    pq.write_table(table, files[1])
    pq.write_table(table.set_column(2, "timestamp", as_times), files[2])
    for file in files:
        deduplicate([file], tmp_path / "out", threshold=0.5, keep=keep)
        assert [row["id"] for row in documents_of(tmp_path / "out")] == [best]
        twins = [row["twin"] for row in clusters_of(tmp_path / "out")]
        assert twins == [None if str(i) == best else best for i in range(3)]
    carried = [*(tmp_path / "out/documents").iterdir()]
    again = [path.rename(tmp_path / path.name) for path in carried]
    assert deduplicate(again, tmp_path / "out2", keep="newest").kept == 1


def test_the_first_is_kept_among_equally_new_and_equally_long(tmp_path):
    corpus = dated([TIMES[0]] * 3)[1:]
    for keep in ("longest", "newest", "first"):
        deduplicate([write_jsonl(tmp_path / "in.jsonl", corpus)], tmp_path / "out", keep=keep)
        assert [row["id"] for row in documents_of(tmp_path / "out")] == ["1"]


@pytest.mark.parametrize(
    ("time", "message"),
    [
        (None, r"document 1 .*in\.jsonl has no `timestamp`, which keep=newest needs"),
        ("yesterday", r"document 1 .*in\.jsonl: `timestamp` is 'yesterday', it must be a timest"),
        ("2024-03-02T00:00:00", r"`timestamp` is '2024-03-02T00:00:00', .* 2024-03-01T00:00:00Z"),
        (1709251200, r"document 1 .*: `timestamp` is '1709251200', it must be a timestamp"),
    ],
)
def test_documents_without_a_time_are_named(tmp_path, time, message):
    source = write_jsonl(tmp_path / "in.jsonl", dated([TIMES[0], time, TIMES[2]]))
    with pytest.raises(DataError, match=message):
        deduplicate([source], tmp_path / "out", keep="newest")
    assert deduplicate([source], tmp_path / "out", threshold=0.5).kept == 1


def test_a_number_of_any_length_stands_beside_a_time(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(f'{{"id": "1", "text": "a", "n": {"9" * 5000}, "timestamp": "{TIMES[0]}"}}')
    assert deduplicate([source], tmp_path / "out", keep="newest").kept == 1


@pytest.mark.parametrize("extra", ["a remark", "[1]", "{"])
def test_another_column_of_the_name_of_other_fields_has_no_time(tmp_path, extra):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["1"], "text": ["a"], "extra": [extra]}), path)
    with pytest.raises(DataError, match=r"document 0 .*in\.parquet has no `timestamp`"):
        deduplicate([path], tmp_path / "out", keep="newest")


def test_files_without_times_are_named_before_their_texts_are_read(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["1"], "text": ["a"], "date": ["2024"]}), path)
    with pytest.raises(DataError, match=r"in\.parquet: .* needs a column `timestamp`, .* id, text"):
        deduplicate([path], tmp_path / "out", keep="newest")
    pq.write_table(pa.table({"id": ["1"], "text": ["a"], "timestamp": [1.5]}), path)
    with pytest.raises(DataError, match=r"in\.parquet: column `timestamp` is double, it must be"):
        deduplicate([path], tmp_path / "out", keep="newest")


def test_exact_duplicates_alone_are_removed_without_a_threshold(tmp_path):
    texts = [WORDS, WORDS.upper(), WORDS, "", "", f"{WORDS}\n"]
    corpus = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    source = write_jsonl(tmp_path / "in.jsonl", corpus)
    report = deduplicate([source], tmp_path / "out", threshold=None)
    assert (report.kept, report.exact_duplicates, report.near_duplicates) == (5, 1, 0)
    assert [row["twin"] for row in clusters_of(tmp_path / "out")] == [None, None, "0", *[None] * 3]


@pytest.mark.parametrize(
    ("exact", "texts", "left", "removed"),
    [
        (
            "paragraph",
            [
                "A title\n\nBody one,\nsecond line\n\nShare this",
                "Another\n\nShare this \n\n---\n\nAnother\n\nsecond line",
                "---\n\n share this\n\nBody one,\nsecond line\n\nShare this",
                "A title\n\nShare this\n\n---",
                "",
            ],
            [
                "A title\n\nBody one,\nsecond line\n\nShare this",
                "Another\n\n---\n\nsecond line",
                "---\n\n share this",
                None,
                "",
            ],
            [0, 2, 2, 2, 0],
        ),
        (
            "line",
            ["Été\n}\n\nmenu", "menu\n}\nmenu\ndish", "  Été\nété\n}"],
            ["Été\n}\n\nmenu", "}\ndish", "été\n}"],
            [0, 2, 1],
        ),
    ],
)
def test_repeated_units_are_removed_from_later_documents(tmp_path, exact, texts, left, removed):
    corpus = [{"id": str(i), "text": text, "n": i} for i, text in enumerate(texts)]
    # The unit of a document that is dropped for a twin makes no other one lose it.
    corpus.insert(0, {"id": "short", "text": "Dropped here"})
    corpus.append({"id": "twin", "text": "dropped, here!!"})
    half = len(corpus) // 2
    parts = [
        write_jsonl(tmp_path / "1.jsonl", corpus[:half]),
        write_jsonl(tmp_path / "2.jsonl", corpus[half:]),
    ]
    outcomes = []
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        outcomes.append(deduplicate(parts, out, threshold=0.95, exact=exact, workers=workers))
        documents = {row["id"]: row["text"] for row in documents_of(out)}
        assert documents.pop("twin") == "dropped, here!!"
        assert documents == {str(i): text for i, text in enumerate(left) if text is not None}
        rows = clusters_of(out)[1:-1]
        assert [row["removed_units"] for row in rows] == removed
        assert [row["kept"] for row in rows] == [text is not None for text in left]
        assert [row["exact"] for row in rows] == [text is None for text in left]
        assert {row["twin"] for row in rows} == {None}
    assert outcomes[0] == outcomes[1]
    assert (outcomes[0].removed_units, outcomes[0].emptied) == (sum(removed), left.count(None))


def test_many_units_are_told_apart_as_the_table_grows(monkeypatch):
    monkeypatch.setattr("data_pipeline.dedup.repeated_units.SMALLEST_TABLE", 4)
    units = RepeatedUnits("line")
    for start in range(0, 3000, 100):
        numbers = range(start, start + 100)
        left, removed = units.remove([f"line {i}\nline {i // 2}" for i in numbers])
        assert left == [f"line {i}" for i in numbers]
        assert removed == [1] * len(numbers)
