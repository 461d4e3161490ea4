"""Token shards as files that other programs read.

A file appears once it is complete. In memory are the index and the ids of one shard, and the
documents of one batch; a document is there as a whole.
"""

import glob
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.errors import DataError, file_errors
from data_pipeline.formats.megatron import LONGEST_SEQUENCE, DatasetWriter, files_of
from data_pipeline.shards import Manifest, TokenReader, load_manifest
from data_pipeline.tokenize import load_tokenizer

COMPRESSION = {".jsonl": None, ".gz": "gzip", ".zst": "zstd"}
DOCUMENTS_PER_BATCH = 4096
TOKENS_PER_BATCH = 1 << 21

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the documents of it that are done, and all its documents."""


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


class Batch(NamedTuple):
    """Consecutive documents.

    Attributes:
        tokens: of all of them, one after another, each with its end-of-document token.
        lengths: tokens of each.
    """

    ids: pa.Array
    tokens: NDArray[Any]
    lengths: NDArray[np.int64]

    def documents(self) -> list[NDArray[Any]]:
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


def export_megatron(
    shards: str | Path, prefix: Path, *, append_eod: bool = True, progress: Progress = _no_progress
) -> Manifest:
    """Write PREFIX.bin and PREFIX.idx, which Megatron's IndexedDataset reads; ids are left out.

    Args:
        append_eod: leave each document its end-of-document token, as the option of this name of
            Megatron's preprocessing does.

    Raises:
        DataError: shards that are unfinished, damaged or empty, a document that is too long for the
            format, or a file that exists or cannot be written.
    """
    manifest = _load(shards)
    if not manifest.documents or not (append_eod or manifest.tokens > manifest.documents):
        raise DataError(f"{shards}: no tokens to write, and Megatron reads no empty dataset")
    bin_path, idx_path = files_of(prefix)
    size = manifest.documents, manifest.vocab_size
    with (
        file_errors(),
        _aside(idx_path) as idx,
        _aside(bin_path) as bin_,
        DatasetWriter(bin_, idx, *size) as writer,
    ):
        for batch in read_batches(manifest, progress):
            if batch.lengths.max() > LONGEST_SEQUENCE:
                raise DataError(
                    f"document {batch.ids[int(batch.lengths.argmax())]} has "
                    f"{batch.lengths.max()} tokens, a sequence of Megatron's has at most "
                    f"{LONGEST_SEQUENCE}; export to parquet instead"
                )
            tokens, lengths = batch.tokens, batch.lengths
            if not append_eod:
                tokens, lengths = np.delete(tokens, np.cumsum(lengths) - 1), lengths - 1
            writer.add(tokens, lengths)
    return manifest


def export_jsonl(shards: str | Path, out: Path, progress: Progress = _no_progress) -> Manifest:
    """Write {"id", "text"} of each document, decoded and without its end, to .jsonl(.gz, .zst).

    Raises:
        DataError: shards that are unfinished or damaged, or a file of another type, that exists,
            or that cannot be written.
    """
    if not out.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        raise DataError(f"{out}: give it a name in .jsonl, .jsonl.gz or .jsonl.zst")
    manifest = _load(shards)
    decode = _decoder(manifest)
    with file_errors(), _aside(out) as aside:
        compression = COMPRESSION[out.suffix]
        with pa.output_stream(str(aside), compression=compression) as file:
            for batch in read_batches(manifest, progress):
                rows = zip(batch.ids.to_pylist(), decode(batch), strict=True)
                lines = (json.dumps({"id": i, "text": t}, ensure_ascii=False) for i, t in rows)
                file.write("".join(f"{line}\n" for line in lines).encode())
    return manifest


def export_parquet(shards: str | Path, out: Path, progress: Progress = _no_progress) -> Manifest:
    """Write the columns id, text (decoded, without its end) and tokens (with it), a row a document.

    Raises:
        DataError: as `export_jsonl` does.
    """
    if out.suffix != ".parquet":
        raise DataError(f"{out}: give it a name in .parquet")
    manifest = _load(shards)
    decode = _decoder(manifest)
    tokens = pa.large_list(pa.from_numpy_dtype(manifest.dtype))
    schema = pa.schema({"id": pa.string(), "text": pa.large_string(), "tokens": tokens})
    with file_errors(), _aside(out) as aside, pq.ParquetWriter(aside, schema) as file:
        for batch in read_batches(manifest, progress):
            ends = np.concatenate([[0], np.cumsum(batch.lengths)])
            column = pa.LargeListArray.from_arrays(ends, batch.tokens)
            texts = pa.array(decode(batch), pa.large_string())
            file.write_table(pa.table([batch.ids, texts, column], schema))
    return manifest


def _load(shards: str | Path) -> Manifest:
    with file_errors():
        return load_manifest(shards)


def _decoder(manifest: Manifest) -> Callable[[Batch], list[str]]:
    coder = load_tokenizer(manifest.tokenizer)
    return lambda batch: coder.decode_batch([tokens[:-1].tolist() for tokens in batch.documents()])


def read_batches(manifest: Manifest, progress: Progress) -> Iterator[Batch]:
    """All documents of a manifest, in their order."""
    done = 0
    progress("export", done, manifest.documents)
    for place, shard in enumerate(manifest.shards):
        reader = TokenReader(replace(manifest, shards=(shard,)))
        ids = _read_ids(manifest, place)
        for first, last in _cuts(reader.lengths):
            documents = [reader.read(n, 0, int(reader.lengths[n])) for n in range(first, last)]
            yield Batch(ids[first:last], np.concatenate(documents), reader.lengths[first:last])
            done += last - first
            progress("export", done, manifest.documents)


def _cuts(lengths: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of documents that hold about TOKENS_PER_BATCH tokens at most, or one document."""
    before = np.concatenate([[0], np.cumsum(lengths)])
    first = 0
    while first < len(lengths):
        enough = int(np.searchsorted(before, before[first] + TOKENS_PER_BATCH, side="right")) - 1
        last = min(max(enough, first + 1), first + DOCUMENTS_PER_BATCH)
        yield first, last
        first = last


def _read_ids(manifest: Manifest, place: int) -> pa.Array:
    shard = manifest.shards[place]
    path = shard.path.removesuffix(".tar") + ".ids.parquet"
    where = f"{manifest.store.name}/{path}"
    content = manifest.store.read(path)
    if content is None:
        raise DataError(f"{where}: missing. Restore it or make the data again")
    try:
        ids = pq.read_table(pa.BufferReader(content))["id"].combine_chunks()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{where}: damaged ({error}). Restore it or make the data again") from error
    if len(ids) != shard.documents:
        raise DataError(
            f"{where}: of other shards: {len(ids)} ids for {shard.documents} documents. Restore it "
            "or make the data again"
        )
    return ids


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A file of another name to write, which then gets the name of `path`.

    What a killed process left is removed. Of two processes that write the same file, one fails.
    """
    if path.exists():
        raise DataError(f"{path}: exists already; remove it, or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*"):
        left.unlink()
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
