"""Texts in JSON Lines and Parquet files, tokenized into shards."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.dedup.batches import read_part
from data_pipeline.dedup.inputs import JSONL_SUFFIXES, Part, open_parquet, refuse_unreadable
from data_pipeline.dedup.jsonl import read_jsonl
from data_pipeline.errors import DataError
from data_pipeline.formats.made import Made, make_shards, names_of
from data_pipeline.shards import Manifest, write_shards

SUFFIXES = (".parquet", *JSONL_SUFFIXES)
DOCUMENTS_PER_REPORT = 512

Progress = Callable[[str, int, int, str], None]
"""Called with the name of a stage, the files of it that are done, all its files, and its speed."""


def _no_progress(stage: str, done: int, total: int, detail: str) -> None:
    pass


def tokenize_files(
    inputs: Sequence[Path],
    tokenizer: Path,
    out: Path,
    *,
    text_field: str = "text",
    id_field: str = "id",
    progress: Progress = _no_progress,
) -> Made:
    """Make shards of the texts of Parquet and JSONL(.gz, .zst) files.

    The same inputs, in any order, and options give the same bytes, also when a killed run is
    repeated, which goes on after the last shard that was finished. Each row is a document, one with
    an empty text, too. In memory are 64 MB of JSON Lines or 8 MB of Parquet, as many documents as
    are tokenized together, and the index and the ids of one shard (its texts, while a killed run
    finds where to go on); a document is there as a whole.

    Args:
        tokenizer: a Hugging Face tokenizer.json, the one of all shards of a training.
        id_field: holds a string. A document without is called FILE:ROW, both counted as
            `names_of` and from 0.

    Raises:
        DataError: a file is missing, damaged, of an unknown type, or has a document without a text;
            what `make_shards` refuses.
    """
    for path in inputs:
        _check(path, text_field, id_field)

    def write(plan: dict[str, Any]) -> Manifest:
        documents = _read_all(names_of(inputs), text_field, id_field, progress)
        return write_shards(documents, tokenizer, out, extra=plan)

    options = {"text_field": text_field, "id_field": id_field}
    return make_shards("tokenize", inputs, options, tokenizer, out, write)


def _check(path: Path, text_field: str, id_field: str) -> None:
    refuse_unreadable(path)
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown file type; allowed are {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        open_parquet(path, [text_field], [id_field]).close()


def _read_all(
    sources: Mapping[str, Path], text_field: str, id_field: str, progress: Progress
) -> Iterator[tuple[str, str]]:
    began = time.monotonic()
    documents = 0
    progress("tokenize", 0, len(sources), "")
    for done, (name, path) in enumerate(sources.items(), 1):
        for document in read_documents(path, name, text_field, id_field):
            yield document
            documents += 1
            if documents % DOCUMENTS_PER_REPORT == 0:
                speed = documents / (time.monotonic() - began)
                detail = f"{documents:,} documents, {speed:,.0f}/s"
                progress("tokenize", done - 1, len(sources), detail)
        progress("tokenize", done, len(sources), f"{documents:,} documents")


def read_documents(
    path: Path, name: str, text_field: str = "text", id_field: str = "id"
) -> Iterator[tuple[str, str]]:
    """(id, text) of each document of a file, in order.

    Args:
        name: of the file in the ids of documents that have none of their own.

    Raises:
        DataError: the file is damaged, or a document has no text or an id that is no string.
    """
    batches = _parquet if path.suffix == ".parquet" else _json_lines
    row = 0
    for ids, texts in batches(path, text_field, id_field):
        for own_id, text in zip(ids, texts, strict=True):
            if text is None:
                raise DataError(
                    f"document {row} (counted from 0) of {path} has no `{text_field}`: add it, "
                    "remove the document, or name the field of the text by --text-field"
                )
            yield f"{name}:{row}" if own_id is None else own_id, text
            row += 1


Columns = tuple[list[str | None], list[str | None]]


def _json_lines(path: Path, text_field: str, id_field: str) -> Iterator[Columns]:
    for table in read_jsonl(path, id_field, text_field):
        for batch in table.to_batches(max_chunksize=DOCUMENTS_PER_REPORT):
            yield batch["id"].to_pylist(), batch["text"].to_pylist()


def _parquet(path: Path, text_field: str, id_field: str) -> Iterator[Columns]:
    with open_parquet(path, [text_field], [id_field]) as file:
        part = Part(path, path, 0, file.metadata.num_rows)
    for records in read_part(part, [text_field, id_field]):
        texts = records[text_field].to_pylist()
        has_ids = id_field in records.schema.names
        yield records[id_field].to_pylist() if has_ids else [None] * len(texts), texts
