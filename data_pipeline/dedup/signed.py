"""What deduplication has to know of texts, also in a file that is written where the texts are.

The file is Parquet, with a row for each document, in input order: its id and a hash of that, a hash
of its text, is_blank, has_words, preference, bands and shingles, as `SignedDocuments` has them. The
last two are missing where only equal texts are duplicates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.batches import Batch, map_batches, read_batches
from data_pipeline.dedup.inputs import Part
from data_pipeline.dedup.settings import Settings
from data_pipeline.dedup.shingles import shingle_sets, shingles_in, utf8
from data_pipeline.dedup.signatures import (
    DIGEST_BYTES,
    SIGNATURE_COLUMNS,
    columns_to_sign,
    digests,
    fixed_width,
    sign_batch,
)
from data_pipeline.engine import Engine
from data_pipeline.errors import DataError
from data_pipeline.stage import make_stage

FILE = "signed.parquet"
DIGEST = np.dtype(f"S{DIGEST_BYTES}")  # padded with zeros, so that equal means all bytes


@dataclass
class SignedDocuments:
    """Consecutive documents: their ids, signatures and shingles.

    Attributes:
        is_blank, has_words, preference, bands: as `Signatures` has them.
        id_digests, text_digests: [documents] of `DIGEST`.
        id_bytes, id_sizes: uint8, [documents] int64.
        shingles, set_sizes: uint64, [documents] int64; of no document where nothing is compared.
    """

    is_blank: NDArray[np.bool_]
    has_words: NDArray[np.bool_]
    preference: NDArray[np.int64]
    bands: NDArray[np.uint32]
    id_digests: NDArray[Any]
    text_digests: NDArray[Any]
    id_bytes: NDArray[np.uint8]
    id_sizes: NDArray[np.int64]
    shingles: NDArray[np.uint64]
    set_sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.preference)


def signed_documents(
    parts: Sequence[Part], settings: Settings, workers: int
) -> Iterator[SignedDocuments]:
    """The documents of the parts, some thousands at a time; those signed before are only read.

    Raises:
        DataError: as `sign_documents`, or a document has no id.
    """
    columns = ["id", *columns_to_sign(settings.keep)]
    signed = ["id", "id_digest", *SIGNATURE_COLUMNS, "shingles"]
    batches = read_batches(parts, columns, signed)
    yield from map_batches(lambda batch: _sign(batch, settings), batches, workers)


class SignedFileWriter:
    """Signs batches of documents and appends them to a new file; equal ones give equal bytes."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._settings = settings
        # Hashes would not get smaller.
        self._file = pq.ParquetWriter(
            path, _schema(settings), compression="none", use_dictionary=False
        )

    def append(self, batch: Batch) -> None:
        """
        Raises:
            DataError: a document has no id or no timestamp that is needed.
        """
        self._file.write_batch(_records(_sign(batch, self._settings), self._file.schema))

    def __enter__(self) -> "SignedFileWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def sign_parts(
    parts: Sequence[Part], folder: Path, settings: Settings, engine: Engine
) -> list[Part]:
    """Sign the documents of each part as a task of its own, and leave them in `folder`.

    Raises:
        DataError: as `signed_documents`.
    """
    folders = [folder / f"{number:06d}" for number in range(len(parts))]
    tasks = [(part, own, settings) for part, own in zip(parts, folders, strict=True)]
    for _ in engine.do_each(sign_part, tasks, folder.parent, get_ready_to_sign):
        pass
    return [replace(part, signed=own / FILE) for part, own in zip(parts, folders, strict=True)]


def sign_part(part: Part, folder: Path, settings: Settings) -> None:
    """Make `folder` a stage with the signed documents of a part."""

    def write(aside: Path) -> None:
        with SignedFileWriter(aside / FILE, settings) as file:
            for batch in read_batches([part], ["id", *columns_to_sign(settings.keep)]):
                file.append(batch)

    make_stage(folder, write)


def get_ready_to_sign() -> None:
    """Compile what signing takes, once for all processes that are copies of this one."""
    some = pa.record_batch({"id": ["a"], "text": ["What is to be ready must have been done once."]})
    part = Part(Path(), Path(), 0, len(some))
    _sign(Batch(part, 0, 0, some), Settings(0.5, 2, 1, 2, "first"))


def _sign(batch: Batch, settings: Settings) -> SignedDocuments:
    ids = batch.records["id"]
    if ids.null_count:
        document = ids.is_null().index(True).as_py()
        raise DataError(f"{batch.locate(document)} has no `id`; add it or remove the document")
    signed = sign_batch(batch, settings)
    data, offsets = utf8(ids)
    shingles, first = np.empty(0, np.uint64), np.zeros(len(ids) + 1, np.int64)
    if settings.bands and batch.is_signed:
        shingles, first = shingles_in(batch.records["shingles"])
    elif settings.bands:
        shingles, first = shingle_sets(batch.records["text"], settings.ngram)
    id_digests = (
        fixed_width(batch.records["id_digest"], DIGEST) if batch.is_signed else digests(ids)
    )
    return SignedDocuments(
        is_blank=signed.is_blank,
        has_words=signed.has_words,
        preference=signed.preference,
        bands=signed.bands,
        id_digests=id_digests.reshape(-1).view(DIGEST),
        text_digests=signed.digests.reshape(-1).view(DIGEST),
        id_bytes=data[offsets[0] : offsets[-1]],
        id_sizes=np.diff(offsets),
        shingles=shingles,
        set_sizes=np.diff(first),
    )


def _schema(settings: Settings) -> pa.Schema:
    fields = {
        "id": pa.large_string(),
        "id_digest": pa.binary(DIGEST_BYTES),
        "text_digest": pa.binary(DIGEST_BYTES),
        "is_blank": pa.bool_(),
        "has_words": pa.bool_(),
        "preference": pa.int64(),
    }
    if settings.bands:
        fields["bands"] = pa.binary(4 * settings.bands)
        fields["shingles"] = pa.large_list(pa.uint64())
    return pa.schema(fields)


def _records(signed: SignedDocuments, schema: pa.Schema) -> pa.RecordBatch:
    """Rows of the file, see `_schema`."""
    count = len(signed)

    def fixed(name: str, values: NDArray[Any]) -> pa.Array:
        data = pa.py_buffer(np.ascontiguousarray(values))
        return pa.FixedSizeBinaryArray.from_buffers(schema.field(name).type, count, [None, data])

    columns = {
        "id": pa.LargeStringArray.from_buffers(
            count, pa.py_buffer(_offsets(signed.id_sizes)), pa.py_buffer(signed.id_bytes)
        ),
        "id_digest": fixed("id_digest", signed.id_digests),
        "text_digest": fixed("text_digest", signed.text_digests),
        "is_blank": pa.array(signed.is_blank),
        "has_words": pa.array(signed.has_words),
        "preference": pa.array(signed.preference),
    }
    if "bands" in schema.names:
        columns["bands"] = fixed("bands", signed.bands.T)
        columns["shingles"] = pa.LargeListArray.from_arrays(
            _offsets(signed.set_sizes), signed.shingles
        )
    return pa.record_batch(columns, schema)


def _offsets(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
