"""What deduplication reads and writes, and what it refuses to."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.dedup import deduplicate
from data_pipeline.engine import Native
from data_pipeline.errors import DataError
from tests.unit.data_pipeline.dedup.corpus import (
    clusters_of,
    documents_of,
    make_corpus,
    write_jsonl,
)


def test_columns_of_parquet_are_carried_as_they_are(tmp_path):
    corpus = [
        {"id": "1", "text": "a", "date": "2020-01-01", "meta": {"score": 1}, "tags": []},
        {"id": "2", "text": "b", "date": "2020-01-02T00:00:00Z", "meta": None, "tags": [1]},
    ]
    pq.write_table(pa.Table.from_pylist(corpus), tmp_path / "in.parquet")
    deduplicate([tmp_path / "in.parquet"], tmp_path / "out")
    assert documents_of(tmp_path / "out") == corpus


@pytest.mark.parametrize("options", [{}, {"memory": 1 << 20}, {"exact": "line"}, {"engine": True}])
def test_columns_of_views_are_read_as_others(tmp_path, options):
    rows = [("1", "a b", "2020-01-01T00:00:00Z", b"x"), ("2", "a b", "2021-01-01T00:00:00Z", b"y")]
    columns = dict(zip(("id", "text", "timestamp", "raw"), zip(*rows, strict=True), strict=True))
    for view in (True, False):
        kinds = (pa.string_view(), pa.binary_view()) if view else (pa.string(), pa.binary())
        types = dict.fromkeys(columns, kinds[0]) | {"raw": kinds[1]}
        arrays = {name: pa.array(values, types[name]) for name, values in columns.items()}
        pq.write_table(pa.table(arrays), tmp_path / f"{view}.parquet")
        engine = {"engine": Native(1)} if "engine" in options else {}
        deduplicate(
            [tmp_path / f"{view}.parquet"], tmp_path / f"{view}", keep="newest", **options | engine
        )
    assert documents_of(tmp_path / "True") == documents_of(tmp_path / "False")
    assert [row["id"] for row in documents_of(tmp_path / "True")] == ["2"]


@pytest.mark.parametrize(
    "other",
    [
        '"meta": {}',
        '"meta": {"date": "2020-01-01T00:00:00Z", "none": null, "empty": []}',
        '"field": 1, "late": 1.50',
        '"field": "one"',
        '"field": [1, "a", {"b": []}]',
        f'"long": {"9" * 5000}, "small": 1E-500',
        '"extra": {"id": "not mine", "text": 5}, "h\\u00e9": "\\ud800 , } \\" é"',
        '"same": 1,"same" : 2',
    ],
)
def test_fields_of_json_lines_are_carried_to_the_letter(tmp_path, other):
    path = tmp_path / "in.jsonl"
    lines = [
        f'{{"id": "1", "text": "a", {other}}}',
        "",
        f' {{ {other} ,"text": "b",\t"id": "2"}}\r',
        '{"id": "3", "field": {}, "text": "c"}',
        '{"text": "d", "id": "4"}',
    ]
    path.write_text("\ufeff" + "\n".join(lines))
    deduplicate([path], tmp_path / "out")
    documents = documents_of(tmp_path / "out")
    assert [(row["id"], row["text"]) for row in documents] == [*zip("1234", "abcd", strict=True)]
    first, second, third, fourth = [row["extra"] for row in documents]
    assert (
        first.replace(", ", ",") == second.replace(", ", ",") == f"{{{other}}}".replace(", ", ",")
    )
    assert (third, fourth) == ('{"field": {}}', None)


def test_json_lines_of_several_tables_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.dedup.jsonl.TABLE_BYTES", 2000)
    corpus = make_corpus(seed=8)
    path = write_jsonl(tmp_path / "in.jsonl", corpus)
    path.write_text(path.read_text() + "\n" * 5000)
    report = deduplicate([path], tmp_path / "out")
    assert [row["id"] for row in clusters_of(tmp_path / "out")] == [row["id"] for row in corpus]
    assert len(documents_of(tmp_path / "out")) == report.kept


def test_no_documents_give_empty_results(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert deduplicate([empty], tmp_path / "out").documents == 0
    assert documents_of(tmp_path / "out") == []
    assert clusters_of(tmp_path / "out") == []


def test_a_second_run_replaces_the_first(tmp_path):
    many = write_jsonl(tmp_path / "many.jsonl", make_corpus(seed=5))
    few = write_jsonl(tmp_path / "few.jsonl", make_corpus(seed=5)[:4])
    deduplicate([many], tmp_path / "out")
    deduplicate([few], tmp_path / "out")
    assert len(clusters_of(tmp_path / "out")) == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "clusters.parquet",
        "documents",
    ]
    kept = sorted((tmp_path / "out/documents").iterdir())
    with pytest.raises(DataError, match=r"lies in .*documents, which will be replaced"):
        deduplicate(kept, tmp_path / "out")


def test_files_of_others_are_not_replaced(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_corpus(seed=5)[:4])
    mine = tmp_path / "mine/documents/thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(DataError, match=r"mine/documents: would be replaced, .* name another"):
        deduplicate([source], tmp_path / "mine")

    deduplicate([source], tmp_path / "out")
    mine = mine.rename(tmp_path / "out/documents/thesis.txt")
    with pytest.raises(DataError, match=r"out/documents: .* no deduplication made thesis\.txt"):
        deduplicate([source], tmp_path / "out")
    assert mine.read_text() == "years of work"

    table = tmp_path / "other/clusters.parquet"
    table.parent.mkdir()
    pq.write_table(pa.table({"star": ["M13"]}), table)
    with pytest.raises(DataError, match=r"clusters\.parquet: .* no deduplication made it"):
        deduplicate([source], tmp_path / "other")
    assert pq.read_table(table).column_names == ["star"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    left = tmp_path / "out/.dedup-killed"
    left.mkdir(parents=True)
    (left / "000000.parquet").touch()
    deduplicate([write_jsonl(tmp_path / "in.jsonl", make_corpus(seed=5)[:4])], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "clusters.parquet",
        "documents",
    ]


@pytest.mark.parametrize("name", ["d[1]", "d{1,2}*?", "d\\1", "d%20 1"])
def test_names_of_folders_are_no_patterns(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    source = write_jsonl(tmp_path / "in.jsonl", make_corpus(seed=5))
    expected = deduplicate([source], tmp_path / "plain")
    assert deduplicate([source], Path(name)) == expected
    assert clusters_of(Path(name)) == clusters_of(tmp_path / "plain")


def test_what_the_file_system_refuses_is_named(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", make_corpus(seed=5)[:4])
    with pytest.raises(DataError, match=r"in\.jsonl: File exists"):
        deduplicate([source], source)
    with pytest.raises(DataError, match=r"in\.jsonl/out: Not a directory"):
        deduplicate([source], source / "out")
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl: cannot be read \(Is a directory\)"):
        deduplicate([folder], tmp_path / "out")


GOOD = '{"id": "1", "text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"id,text\n", r"in\.csv: unknown file type; allowed are \.parquet, \.jsonl"),
        ("in.jsonl", (GOOD + '{"id": "2", \n').encode(), r"document 1 .*in\.jsonl: .* not JSON"),
        ("in.jsonl", b'{"id": 2, "text": "b"}', r"document 0 .*in\.jsonl: `id` must be a string"),
        ("in.jsonl", b'{"id": "2", "text": "\\ud800"}', r"`text` has half a surrogate pair"),
        ("in.jsonl", b"[1]", r"document 0 .*in\.jsonl: .* no JSON object but \[1\]"),
        ("in.jsonl", b"[" * 100_000, r"document 0 .*in\.jsonl: .* not JSON"),
        ("in.jsonl", (GOOD + '{"id": "2"}').encode(), r"document 1 .*in\.jsonl has no `text`"),
        ("in.jsonl", (GOOD + GOOD).encode(), r"id `1` stands twice: document 0 .* document 1"),
        ("in.jsonl", b'{"id": "1", "text": "\xff"}\n', r"in\.jsonl: .* not JSON"),
        ("in.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:40], r"in\.jsonl\.gz: damaged"),
        ("in.jsonl.gz", GOOD.encode(), r"in\.jsonl\.gz: damaged"),
        ("in.jsonl.zst", zstandard.compress(GOOD.encode() * 99)[:20], r"in\.jsonl\.zst: damaged"),
        ("in.parquet", b"PAR1", r"in\.parquet: damaged or not Parquet"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        deduplicate([tmp_path / name], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_columns_are_named(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["1"], "body": ["a"]}), path)
    with pytest.raises(DataError, match=r"in\.parquet: no column `text` among id, body"):
        deduplicate([path], tmp_path / "out")
    pq.write_table(pa.table({"id": [1], "text": ["a"]}), path)
    with pytest.raises(DataError, match=r"in\.parquet: column `id` is int64"):
        deduplicate([path], tmp_path / "out")
    with pytest.raises(DataError, match=r"none\.parquet: cannot be read \(No such file"):
        deduplicate([tmp_path / "none.parquet"], tmp_path / "out")


def test_damage_inside_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(pa.Table.from_pylist(make_corpus(seed=6)), path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"in\.parquet: damaged"):
        deduplicate([path], tmp_path / "out")
