"""A file on this machine or a file system that it has mounted."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.crawl.reader import Blocks, Reader
from data_pipeline.errors import DataError

READ_BYTES = 1 << 18


@dataclass(frozen=True)
class LocalFile:
    """A file by its path; with a `sha256`, the one with these bytes and no other."""

    path: Path
    sha256: str | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def basename(self) -> str:
        return self.path.name

    @property
    def size(self) -> int:
        """In bytes."""
        with self._readable():
            return self.path.stat().st_size

    @property
    def identity(self) -> dict[str, str | int]:
        """What must not change between two starts of a run."""
        assert self.sha256 is not None, "asked for after identified()"
        return {"sha256": self.sha256}

    def identified(self) -> "LocalFile":
        """This file with the sha256 of its bytes, all of which are read for that."""
        with self._readable(), self.path.open("rb") as file:
            return replace(self, sha256=hashlib.file_digest(file, "sha256").hexdigest())

    def open(self, start: int = 0) -> Reader:
        with self._readable():
            return Reader(self.blocks, self.path.stat().st_size, start)

    def blocks(self, start: int = 0) -> Blocks:
        with self._readable(), self.path.open("rb") as file:
            file.seek(start)
            while block := file.read(READ_BYTES):
                yield block

    def verify(self, sha256: str) -> None:
        """Raises DataError if these are not the bytes that were to be read."""
        if self.sha256 not in (None, sha256):
            raise DataError(
                f"{self.path}: the file has changed while the run went on; choose another --out, "
                "or put it back as it was"
            )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Keep a failing disk from looking like a damaged archive."""
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error
