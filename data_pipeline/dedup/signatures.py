"""One pass over all texts: what is kept in memory of each document."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.dedup.batches import Batch, map_batches, read_batches
from data_pipeline.dedup.inputs import Part
from data_pipeline.dedup.minhash import sign
from data_pipeline.dedup.settings import Keep, Settings
from data_pipeline.dedup.shingles import utf8
from data_pipeline.dedup.timestamps import EXTRA, TIMESTAMP, timestamps

DIGEST_BYTES = 16
SIGNATURE_COLUMNS = ("text_digest", "is_blank", "has_words", "preference", "bands")


@dataclass(frozen=True)
class Signatures:
    """One entry per document, in input order: 26 bytes, and 4 for each band.

    Attributes:
        digests: [documents, 16] uint8, a hash of the text.
        is_blank: [documents] bool, whether the text is empty or white space.
        has_words: [documents] bool.
        preference: [documents] int64, greater for the one to keep of a cluster.
        bands: [bands, documents] uint32, a hash of each band, without meaning where there are no
            words.
    """

    digests: NDArray[np.uint8]
    is_blank: NDArray[np.bool_]
    has_words: NDArray[np.bool_]
    preference: NDArray[np.int64]
    bands: NDArray[np.uint32]


def sign_documents(parts: Sequence[Part], settings: Settings, workers: int) -> Signatures:
    """Sign the documents, those that are not signed yet; 0 bands give none.

    Raises:
        DataError: a document cannot be read, or has no text or no timestamp that is needed.
    """

    def sign_in_place(batch: Batch) -> tuple[slice, Signatures]:
        place = slice(batch.row, batch.row + len(batch.records))
        return place, sign_batch(batch, settings)

    documents = sum(part.rows for part in parts)
    result = Signatures(
        digests=np.empty((documents, DIGEST_BYTES), np.uint8),
        is_blank=np.empty(documents, np.bool_),
        has_words=np.empty(documents, np.bool_),
        preference=np.empty(documents, np.int64),
        bands=np.empty((settings.bands, documents), np.uint32),
    )
    batches = read_batches(parts, columns_to_sign(settings.keep), SIGNATURE_COLUMNS)
    for place, signed in map_batches(sign_in_place, batches, workers):
        result.digests[place] = signed.digests
        result.is_blank[place] = signed.is_blank
        result.has_words[place] = signed.has_words
        result.preference[place] = signed.preference
        result.bands[:, place] = signed.bands
    return result


def columns_to_sign(keep: Keep) -> list[str]:
    return ["text", TIMESTAMP, EXTRA] if keep == "newest" else ["text"]


def sign_batch(batch: Batch, settings: Settings) -> Signatures:
    """The signatures of the documents of a batch."""
    if batch.is_signed:
        return _signatures_in(batch.records, settings.bands)
    texts = batch.records["text"]
    hashes, has_words = sign(texts, bands=settings.bands, rows=settings.rows, ngram=settings.ngram)
    is_blank = np.zeros(len(texts), np.bool_)
    for i in np.flatnonzero(~has_words).tolist():
        is_blank[i] = not texts[i].as_py().strip()
    preference = _preference(batch, settings.keep)
    return Signatures(digests(texts), is_blank, has_words, preference, hashes)


def _signatures_in(records: pa.RecordBatch, bands: int) -> Signatures:
    """Those that were written before, see `dedup.signed`."""
    hashes = np.empty((0, len(records)), np.uint32)
    if bands:
        hashes = fixed_width(records["bands"], np.uint32).reshape(-1, bands).T
    return Signatures(
        digests=fixed_width(records["text_digest"], np.uint8).reshape(-1, DIGEST_BYTES),
        is_blank=records["is_blank"].to_numpy(zero_copy_only=False),
        has_words=records["has_words"].to_numpy(zero_copy_only=False),
        preference=records["preference"].to_numpy(),
        bands=hashes,
    )


def fixed_width(values: pa.FixedSizeBinaryArray, dtype: Any) -> NDArray[Any]:
    """Their bytes as values of another type, without a copy."""
    width = values.type.byte_width
    data = np.frombuffer(values.buffers()[1], np.uint8)
    return data[values.offset * width : (values.offset + len(values)) * width].view(dtype)


def digests(texts: pa.Array) -> NDArray[np.uint8]:
    """A hash of each string, [strings, 16]."""
    data, offsets = utf8(texts)
    view = data.data
    hashes = [
        hashlib.blake2b(view[start:stop], digest_size=DIGEST_BYTES).digest()
        for start, stop in pairwise(offsets.tolist())
    ]
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, DIGEST_BYTES)


def _preference(batch: Batch, keep: Keep) -> NDArray[np.int64]:
    if keep == "newest":
        return timestamps(batch)
    if keep == "longest":
        lengths: NDArray[np.int64] = (
            pc.utf8_length(batch.records["text"]).cast(pa.int64()).to_numpy()
        )
        return lengths
    return np.zeros(len(batch.records), np.int64)
