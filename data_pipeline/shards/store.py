"""Where shards lie: a folder on this machine, or one behind https:// or s3://."""

import fcntl
import hashlib
import mmap
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError

# A mapped file holds a file descriptor, of which a process commonly has 1024.
MAPPED_FILES = 512


class StoredFile(NamedTuple):
    """A file of a manifest: its path below the manifest's folder, and what proves it."""

    path: str
    bytes: int
    sha256: str


class Store(Protocol):
    """The files of one manifest. What is not what the manifest says is a DataError."""

    @property
    def name(self) -> str:
        """The folder or the URL, without what is secret in it."""

    def read(self, path: str) -> bytes | None:
        """A file as it is now; None if there is no such file."""

    def check(self, files: Iterable[StoredFile]) -> None:
        """Look at what can be known of these files without reading them."""

    def file(self, path: str, sha256: str) -> Path:
        """A verified file on this machine."""

    def open(self, file: StoredFile) -> BinaryIO:
        """A verified file to read."""

    def map(self, file: StoredFile) -> NDArray[np.uint8]:
        """The bytes of a verified file, mapped."""

    def is_at_hand(self, file: StoredFile) -> bool:
        """Whether `map` need not wait for another machine."""

    def prefetch(self, files: Iterable[StoredFile]) -> Iterable[Callable[[], None]]:
        """What is to be done, in this order, so that these files are there when they are needed."""

    def has_writer(self) -> bool | None:
        """Whether a process adds shards now; None if that cannot be known."""


class LocalStore:
    """A folder on this machine, or on a file system that it has mounted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def name(self) -> str:
        return str(self._folder)

    def read(self, path: str) -> bytes | None:
        try:
            return (self._folder / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"{self._folder / path}: {error.strerror or error}") from error

    def check(self, files: Iterable[StoredFile]) -> None:
        for file in files:
            path = self._folder / file.path
            found = _require_file(path).stat().st_size
            if found != file.bytes:
                raise DataError(
                    f"{path}: cut or replaced: it has {found} bytes, the manifest says "
                    f"{file.bytes}. Restore it or make the data again"
                )

    def file(self, path: str, sha256: str) -> Path:
        file = self._folder / path
        _verify(file, sha256)
        return file

    def open(self, file: StoredFile) -> BinaryIO:
        return self.file(file.path, file.sha256).open("rb")

    def map(self, file: StoredFile) -> NDArray[np.uint8]:
        return _map_verified(self._folder / file.path, file.sha256)

    def is_at_hand(self, file: StoredFile) -> bool:
        return True

    def prefetch(self, files: Iterable[StoredFile]) -> Iterable[Callable[[], None]]:
        # Reading all of it to verify it brings it into the page cache.
        return [partial(_verify_once, self._folder / file.path, file.sha256) for file in files]

    def has_writer(self) -> bool | None:
        try:
            with (self._folder / ".lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        except OSError:
            return None
        return False


def map_file(file: BinaryIO) -> NDArray[np.uint8]:
    """Its bytes, mapped; a lock on the open file lasts as long as the array does."""
    # Unlike numpy's, this mapping keeps its own descriptor of the same open file.
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def sha256_of(file: Any) -> str:
    """Of the rest of an open file."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def _require_file(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path}: missing, though the manifest lists it. Restore it or make the data again"
        )
    return path


def _verify(path: Path, sha256: str) -> None:
    with _require_file(path).open("rb") as file:
        found = sha256_of(file)
    if found != sha256:
        raise DataError(
            f"{path}: damaged or replaced: its sha256 is {found}, the manifest says {sha256}. "
            "Restore it or make the data again"
        )


# Keyed by the hash too, so that shards made again at the same place are verified again.
_verify_once = cache(_verify)


@lru_cache(maxsize=MAPPED_FILES)
def _map_verified(path: Path, sha256: str) -> NDArray[np.uint8]:
    _verify_once(path, sha256)
    with path.open("rb") as file:
        return map_file(file)
