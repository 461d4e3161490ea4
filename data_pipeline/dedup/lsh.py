"""The passes on Daft: sign all documents, group equal bands, fetch the shingles of candidates."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataType, col
from numpy.typing import NDArray

from data_pipeline.dedup.minhash import band_hashes, minhash
from data_pipeline.dedup.shingles import shingle_hashes

# Enough to make Daft's cost per call small, few enough to fit a container's 64 MB of shared memory.
DOCUMENTS_PER_CALL = 128


@dataclass(frozen=True)
class Signatures:
    """What is kept in memory of each document.

    Attributes:
        lengths: characters of the text; null where it is missing.
        digests: 128 bits of the text's hash; null where it is blank.
        bands: list<uint64>, one hash per band; empty where it has no words.
    """

    lengths: pa.Array
    digests: pa.Array
    bands: pa.Array


class Signer:
    def __init__(self, bands: int, rows: int, ngram: int) -> None:
        self._bands = bands
        self._rows = rows
        self._ngram = ngram

    @daft.method.batch(
        return_dtype=DataType.struct(
            {
                "length": DataType.int64(),
                "digest": DataType.binary(),
                "bands": DataType.list(DataType.uint64()),
            }
        ),
        unnest=True,
        batch_size=DOCUMENTS_PER_CALL,
    )
    def sign(self, text: daft.Series) -> pa.Array:
        texts: list[str | None] = text.to_pylist()
        hashes, first = shingle_hashes([text or "" for text in texts], self._ngram)
        has_words = first[1:] > first[:-1]
        signatures = minhash(hashes, np.unique(first), self._bands * self._rows)
        offsets = np.concatenate([[0], np.cumsum(has_words * self._bands)])
        bands = band_hashes(signatures, self._bands, self._rows).ravel()
        return pa.StructArray.from_arrays(
            [
                pa.array([None if text is None else len(text) for text in texts], pa.int64()),
                pa.array([_digest(text) for text in texts], pa.binary()),
                pa.ListArray.from_arrays(offsets.astype(np.int32), bands),
            ],
            names=["length", "digest", "bands"],
        )


class Shingler:
    def __init__(self, ngram: int) -> None:
        self._ngram = ngram

    @daft.method.batch(return_dtype=DataType.list(DataType.uint64()), batch_size=DOCUMENTS_PER_CALL)
    def shingle(self, text: daft.Series) -> pa.Array:
        hashes, first = shingle_hashes(text.to_pylist(), self._ngram)
        sets = [np.unique(hashes[a:b]) for a, b in pairwise(first)]
        offsets = np.cumsum([0, *map(len, sets)], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, np.concatenate([hashes[:0], *sets]))


def _digest(text: str | None) -> bytes | None:
    if not text or text.isspace():
        return None
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def sign(
    parts: Sequence[Path], ids: pa.Array, *, bands: int, rows: int, ngram: int, workers: int
) -> Signatures:
    """Sign the documents of the Parquet files; the result is in the order of `ids`."""
    signer = _spread(Signer, workers)(bands, rows, ngram)
    table = _read(parts).select(col("id"), signer.sign(col("text"))).to_arrow()
    # Daft promises no order.
    table = table.take(pc.index_in(ids, table["id"].cast(ids.type)))
    return Signatures(*(table[name].combine_chunks() for name in ("length", "digest", "bands")))


def bucket_documents(rows: NDArray[np.int64], bands: pa.Array) -> list[tuple[int, ...]]:
    """The groups of documents that share a band, each group sorted and listed once."""
    shared = (
        daft.from_arrow(pa.table({"row": rows, "band": bands}))
        .explode("band")
        .where(col("band").not_null())
        .groupby("band")
        .agg(col("row").list_agg().alias("rows"), col("row").count().alias("size"))
        .where(col("size") > 1)
        .to_arrow()
    )
    return sorted({tuple(sorted(rows)) for rows in shared["rows"].to_pylist()})


def shingle_sets(
    parts: Sequence[Path], ids: pa.Array, *, ngram: int, workers: int
) -> dict[str, NDArray[np.uint64]]:
    """The shingles of the documents named, each sorted and without repeats."""
    wanted = daft.from_arrow(pa.table({"id": ids}))
    shingler = _spread(Shingler, workers)(ngram)
    table = (
        _read(parts)
        .join(wanted, on="id", how="semi")
        .select(col("id"), shingler.shingle(col("text")).alias("shingles"))
        .to_arrow()
    )
    return {
        name.as_py(): shingles.values.to_numpy()
        for name, shingles in zip(table["id"], table["shingles"], strict=True)
    }


def _read(parts: Sequence[Path]) -> daft.DataFrame:
    if not parts:
        schema = pa.schema({"id": pa.string(), "text": pa.string()})
        return daft.from_arrow(schema.empty_table())
    # Daft takes paths for glob patterns.
    paths = [re.sub(r"([\\*?\[\]{}])", r"\\\1", str(part.absolute())) for part in parts]
    return daft.read_parquet(paths).select("id", "text")


def _spread(operator: type, workers: int) -> Any:
    # One worker stays in this process and saves the start of another.
    return daft.cls(operator, max_concurrency=workers if workers > 1 else None)
