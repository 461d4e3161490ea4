"""Documents that tasks have signed are deduplicated as if this process had read their texts."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.dedup import deduplicate
from data_pipeline.dedup.index import checked_settings, deduplicate_with_index
from data_pipeline.dedup.inputs import Part, parquet_parts
from data_pipeline.dedup.signed import FILE, sign_part, sign_parts
from data_pipeline.engine import Native
from data_pipeline.errors import DataError
from tests.files import contents
from tests.unit.data_pipeline.dedup.corpus import make_corpus, write_jsonl

ENGINE = Native(2)


@pytest.fixture
def inputs(tmp_path):
    """Files of both kinds, with blank texts, texts without words and an empty file."""
    corpus = make_corpus(seed=5)
    odd = [{"id": f"odd-{i}", "text": text} for i, text in enumerate(["", " ", "?!", "?!", "Ωδ"])]
    table = pa.Table.from_pylist([{"id": d["id"], "text": d["text"]} for d in corpus[50:]])
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=7)
    pq.write_table(table.slice(0, 0), tmp_path / "c.parquet")
    first = write_jsonl(tmp_path / "a.jsonl", [*corpus[:50], *odd])
    return [first, tmp_path / "b.parquet", tmp_path / "c.parquet"]


@pytest.mark.parametrize("options", [{}, {"threshold": None}, {"exact": "line"}], ids=str)
@pytest.mark.parametrize("memory", [None, 1 << 20])
def test_an_engine_changes_no_byte(tmp_path, inputs, memory, options):
    if memory and "exact" in options:
        options = {"keep": "first"}
    deduplicate(inputs, tmp_path / "one", memory=memory, **options)
    deduplicate(inputs, tmp_path / "many", memory=memory, engine=ENGINE, **options)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_texts_that_are_signed_are_not_hashed_again(tmp_path, inputs, monkeypatch):
    settings = checked_settings(0.8, None, None, 5, "longest")
    (tmp_path / "scratch").mkdir()
    parts = sign_parts(
        parquet_parts(inputs, tmp_path / "scratch"), tmp_path / "scratch/signed", settings, ENGINE
    )
    deduplicate(inputs, tmp_path / "one")
    monkeypatch.setattr("data_pipeline.dedup.signatures.sign", None)
    monkeypatch.setattr("data_pipeline.dedup.shingle_file.shingle_sets", None)
    monkeypatch.setattr("data_pipeline.dedup.signed.shingle_sets", None)
    for name, memory in (("all", None), ("little", 1 << 20)):
        deduplicate(
            [part.path for part in parts],
            tmp_path / name,
            memory=memory,
            signed=[part.signed for part in parts],
        )
        assert contents(tmp_path / name) == contents(tmp_path / "one")


def test_an_index_takes_documents_that_an_engine_signs(tmp_path, inputs):
    settings = checked_settings(0.8, None, None, 5, "longest")
    for name, engine in (("one", None), ("many", ENGINE)):
        for dump in inputs[:2]:
            deduplicate_with_index(
                [dump],
                tmp_path / name,
                tmp_path / f"index-{name}",
                settings,
                memory=1 << 20,
                engine=engine,
            )
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_a_part_is_signed_twice_with_the_same_bytes(tmp_path, inputs):
    settings = checked_settings(0.8, None, None, 5, "longest")
    part = Part(inputs[1], inputs[1], 0, 70)
    for name in ("a", "b", "b"):
        sign_part(part, tmp_path / name, settings)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert pq.read_metadata(tmp_path / "a" / FILE).num_rows == pq.read_metadata(inputs[1]).num_rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "text": "x"}, {"id": None, "text": "y"}], "document 1 .* has no `id`"),
        ([{"id": "a", "text": None}], "document 0 .* has no `text`"),
    ],
)
def test_a_task_says_which_document_is_wrong(tmp_path: Path, rows, message):
    pq.write_table(
        pa.Table.from_pylist(rows, pa.schema([("id", pa.string()), ("text", pa.string())])),
        tmp_path / "in.parquet",
    )
    with pytest.raises(DataError, match=message):
        deduplicate([tmp_path / "in.parquet"], tmp_path / "out", engine=ENGINE)
