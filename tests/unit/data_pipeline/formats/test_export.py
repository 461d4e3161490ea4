"""Shards as Parquet and JSON Lines."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.formats import export as module
from data_pipeline.formats import export_jsonl, export_megatron, export_parquet, tokenize_files
from data_pipeline.shards import write_shards
from tests.unit.data_pipeline.formats.corpus import (
    ids_of,
    make_documents,
    make_tokenizer,
    tokens_of,
)

DOCUMENTS = make_documents(60)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    out, tokenizer = tmp_path / "shards", make_tokenizer(tmp_path / "bpe.json")
    write_shards(DOCUMENTS, tokenizer, out, tokens_per_shard=400, extra={})
    assert len(list(out.glob("shards/*.tar"))) > 2
    return out


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines_hold_the_texts(tmp_path: Path, shards: Path, suffix: str) -> None:
    out = tmp_path / f"new/texts.{suffix}"
    export_jsonl(shards, out)
    with pa.input_stream(str(out), compression="detect") as file:
        rows = [json.loads(line) for line in file.read().splitlines()]
    assert rows == [{"id": name, "text": text} for name, text in DOCUMENTS]
    assert list(out.parent.iterdir()) == [out]
    tokenize_files([out], shards / "tokenizer.json", tmp_path / "again")
    assert tokens_of(tmp_path / "again") == tokens_of(shards)
    assert ids_of(tmp_path / "again") == ids_of(shards)


def test_parquet_holds_texts_and_tokens(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 100)
    out = tmp_path / "texts.parquet"
    export_parquet(shards, out)
    table = pq.read_table(out)
    assert table.schema.field("tokens").type.value_type == pa.uint16()
    rows = table.to_pylist()
    assert [(row["id"], row["text"]) for row in rows] == DOCUMENTS
    assert [row["tokens"] for row in rows] == tokens_of(shards)
    assert pq.ParquetFile(out).num_row_groups > 10


def test_batches_are_bounded_by_tokens_and_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 10)
    monkeypatch.setattr(module, "DOCUMENTS_PER_BATCH", 3)
    lengths = np.array([4, 6, 1, 30, 2, 2, 2, 2])
    assert list(module._cuts(lengths)) == [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8)]


@pytest.mark.parametrize(
    ("export", "name"),
    [(export_jsonl, "a.jsonl"), (export_parquet, "a.parquet"), (export_megatron, "a.bin")],
)
def test_a_file_that_exists_is_kept(tmp_path: Path, shards: Path, export, name: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match=rf"{name}: exists already; remove it"):
        export(shards, tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".a")] == []


@pytest.mark.parametrize(("export", "name"), [(export_jsonl, "a.txt"), (export_parquet, "a.pq")])
def test_another_type_of_file_is_refused(tmp_path: Path, shards: Path, export, name: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=rf"{name}: give it a name in "):
        export(shards, tmp_path / name)


def test_what_a_killed_export_left_is_removed(tmp_path: Path, shards: Path) -> None:
    (tmp_path / ".a.jsonl.123").write_text("half")
    (tmp_path / ".a.jsonl.notes").write_text("mine")
    export_jsonl(shards, tmp_path / "a.jsonl")
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".a.jsonl.notes"]


def test_damaged_ids_are_named(tmp_path: Path, shards: Path) -> None:
    ids = shards / "shards/shard-00001.ids.parquet"
    pq.write_table(pa.table({"id": ["one"]}), ids)
    with pytest.raises(DataError, match=r"00001\.ids\.parquet: of other shards: 1 ids for \d+"):
        export_jsonl(shards, tmp_path / "a.jsonl")
    ids.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"00001\.ids\.parquet: damaged"):
        export_jsonl(shards, tmp_path / "a.jsonl")
    ids.unlink()
    with pytest.raises(DataError, match=r"00001\.ids\.parquet: missing"):
        export_jsonl(shards, tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()
