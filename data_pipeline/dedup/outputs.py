"""The files that a deduplication leaves, replaced all at once."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError

DOCUMENTS = "documents"
CLUSTERS = "clusters.parquet"
SUPERSEDED = "superseded.parquet"
CLUSTERS_COLUMNS = {"id", "cluster", "kept", "twin", "jaccard"}
SUPERSEDED_COLUMNS = {"id", "dump", "cluster", "twin", "jaccard"}
SCRATCH_PREFIX = ".dedup-"


@contextmanager
def staged_results(out: Path) -> Iterator[Path]:
    """A scratch folder whose documents/ and *.parquet replace those of `out` at the end.

    What a killed run left is removed, so that only one run at a time may use `out`.

    Raises:
        DataError: the file system refuses something, or `out` has a documents/ or a
            clusters.parquet that no deduplication made; `out` keeps them.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        _refuse_other_files(out)
        for leftover in out.glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(leftover)
        with TemporaryDirectory(dir=out, prefix=SCRATCH_PREFIX) as name:
            scratch = Path(name)
            yield scratch
            if (out / DOCUMENTS).exists():
                (out / DOCUMENTS).rename(scratch / "replaced")
            if (scratch / SUPERSEDED).exists():
                (scratch / SUPERSEDED).rename(out / SUPERSEDED)
            else:
                (out / SUPERSEDED).unlink(missing_ok=True)
            (scratch / CLUSTERS).rename(out / CLUSTERS)
            (scratch / DOCUMENTS).rename(out / DOCUMENTS)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror or error}") from error


def _refuse_other_files(out: Path) -> None:
    folder, table = out / DOCUMENTS, out / CLUSTERS
    advice = "move it away or name another --out"
    for path, columns in ((table, CLUSTERS_COLUMNS), (out / SUPERSEDED, SUPERSEDED_COLUMNS)):
        if path.exists() and not _has_columns(path, columns):
            raise DataError(f"{path}: would be replaced, but no deduplication made it; {advice}")
    if not folder.exists():
        return
    if not table.exists():
        raise DataError(f"{folder}: would be replaced, but has no {CLUSTERS} beside it; {advice}")
    for path in sorted(folder.iterdir()):
        if not path.match("part-*.parquet"):
            raise DataError(
                f"{folder}: would be replaced, but no deduplication made {path.name} in it; "
                f"{advice}"
            )


def _has_columns(table: Path, columns: set[str]) -> bool:
    try:
        return set(pq.read_schema(table).names) >= columns
    except pa.ArrowInvalid:
        return False
