"""How much memory a run may take."""

import re
from dataclasses import dataclass

from data_pipeline.errors import DataError

# In memory of a document of a batch: signature, digests, id, sorting keys and trees.
BYTES_PER_DOCUMENT = 512
# In memory of a shingle that is compared: itself, its place on disk, and the pages it came in.
BYTES_PER_SHINGLE = 64
# In memory of a row of a band table that another document shares.
BYTES_PER_ROW = 128
LEAST_MEMORY = 1 << 20
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Limits:
    """How much is in memory at a time, besides the program itself (0.3 GB)."""

    documents: int
    shingles: int
    rows: int


def limits_of(memory: int) -> Limits:
    """A third of the memory for each of what is held at a time.

    Raises:
        DataError: it is less than a megabyte.
    """
    if memory < LEAST_MEMORY:
        raise DataError(f"memory={memory} bytes is not allowed: it is at least {LEAST_MEMORY}")
    return Limits(
        documents=memory // 3 // BYTES_PER_DOCUMENT,
        shingles=memory // 3 // BYTES_PER_SHINGLE,
        rows=memory // 3 // BYTES_PER_ROW,
    )


def parse_memory(text: str) -> int:
    """Bytes, from a number with MB, GB or TB.

    Raises:
        DataError: it is written otherwise.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]B)", text)
    if match is None:
        raise DataError(f"memory={text} is not allowed: write it as in 500MB or 2GB")
    return int(float(match[1]) * UNITS[match[2]])
