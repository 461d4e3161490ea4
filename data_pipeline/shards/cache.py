"""Files from far away, kept in a folder of bounded size that the processes of a machine share.

FOLDER/.lock           held while room is made
FOLDER/<sha256>        a file, locked (shared) by whoever reads or has mapped it
FOLDER/<sha256>.part   one that is downloaded, locked by who does; without a lock it was killed

Locks are flock(2): they end with the process that holds them, however it ends.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from time import monotonic, sleep
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError, file_errors
from data_pipeline.shards.store import StoredFile, map_file, sha256_of

DEFAULT_GB = 64.0
# Of the bound, what one process has mapped: several share it, and need room for what comes next.
MAPPED_SHARE = 1 / 16
# Of the bound, what is fetched ahead, so that it does not drive out what is in use.
PREFETCHED_SHARE = 1 / 2
PART = ".part"
OWN_NAME = re.compile(rf"[0-9a-f]{{64}}({re.escape(PART)})?")
# The others may only just be done with what they have mapped.
ROOM_WAIT_S = 60.0
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = logging.getLogger(__name__)


class Cache:
    """A folder of files named by their sha256; the least recently used make room for new ones.

    Never more than `max_bytes` of them lie in it; files of other names are left alone, and do not
    count. What a process has mapped is not removed, and counts. A process keeps at most a sixteenth
    of the bound mapped, or one file. The folder may be used by many processes of one machine; a
    file that several want is downloaded by one of them.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._verified: set[str] = set()
        self._mapped: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        self._mapping = Lock()

    @classmethod
    def of(cls, folder: str = "", gb: float = DEFAULT_GB) -> "Cache":
        """By default in $FARSPAN_CACHE/shards, and that in ~/.cache/farspan."""
        root = os.environ.get("FARSPAN_CACHE") or Path.home() / ".cache" / "farspan"
        return cls(Path(folder or Path(root) / "shards"), int(gb * 1e9))

    def require_room_for(self, files: Iterable[StoredFile], source: str) -> None:
        """Raises DataError if one of the files is larger than the cache may be."""
        largest = max(files, key=lambda file: file.bytes, default=None)
        if largest is not None and largest.bytes > self.max_bytes:
            raise DataError(
                f"{source}/{largest.path} has {largest.bytes} bytes, and the cache {self.folder} "
                f"may hold {self.max_bytes}: raise data.cache_gb to a few such shards"
            )

    def open(
        self,
        file: StoredFile,
        name: str,
        download: Callable[[], Iterable[bytes]],
        *,
        if_idle: bool = False,
    ) -> BinaryIO | None:
        """The verified file, which stays as long as it, or a mapping of it, is open.

        Args:
            name: of the file, in messages.
            download: its blocks, for a file that is not there.
            if_idle: give None at once if another thread or process downloads it.

        Raises:
            DataError: another file arrives, there is no room, the folder cannot be written, or
                what `download` raises.
        """
        with file_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                if (found := self._open_cached(file)) is not None:
                    return found
                with self._part(file, wait=not if_idle) as part:
                    if part is not None:
                        self._download(file, name, download, part)
                    elif if_idle:
                        return None

    def map(
        self, file: StoredFile, name: str, download: Callable[[], Iterable[bytes]]
    ) -> NDArray[np.uint8]:
        """The bytes of the verified file, mapped; for the rest see `open`."""
        with self._mapping:
            if (mapped := self._mapped.get(file.sha256)) is not None:
                self._mapped.move_to_end(file.sha256)
                return mapped
        opened = self.open(file, name, download)
        assert opened is not None, "it was waited for"
        with opened:
            mapped = map_file(opened)
        with self._mapping:
            self._mapped[file.sha256] = mapped
            self._unmap(max(int(self.max_bytes * MAPPED_SHARE), len(mapped)))
        return mapped

    def has_mapped(self, file: StoredFile) -> bool:
        with self._mapping:
            return file.sha256 in self._mapped

    def _unmap(self, down_to: int) -> None:
        """Forget the mappings used longest ago; who uses one still has it."""
        mapped_bytes = sum(len(mapped) for mapped in self._mapped.values())
        while mapped_bytes > down_to:
            sha256, mapped = self._mapped.popitem(last=False)
            mapped_bytes -= len(mapped)
            with suppress(OSError):
                os.utime(self.folder / sha256)

    def _open_cached(self, file: StoredFile) -> BinaryIO | None:
        path = self.folder / file.sha256
        opened = _open_locked(path, fcntl.LOCK_SH)
        if opened is None:
            return None
        os.utime(path)
        if file.sha256 not in self._verified:
            if sha256_of(opened) != file.sha256:
                log.warning("%s: damaged; it is fetched again", path)
                opened.close()
                path.unlink(missing_ok=True)
                return None
            opened.seek(0)
            self._verified.add(file.sha256)
        return opened

    @contextmanager
    def _part(self, file: StoredFile, *, wait: bool) -> Iterator[BinaryIO | None]:
        """The open file to download into; None if somebody else did so in the meantime, or does."""
        path = self.folder / (file.sha256 + PART)
        path.touch()
        part = _open_locked(path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if part is None:
            yield None
            return
        with part:
            try:
                # Somebody may have finished it between a look for it and the lock.
                yield None if (self.folder / file.sha256).exists() else part
            finally:
                if _is_at(path, part):
                    path.unlink()

    def _download(
        self,
        file: StoredFile,
        name: str,
        download: Callable[[], Iterable[bytes]],
        part: BinaryIO,
    ) -> None:
        self._reserve(file.bytes, part)
        digest = hashlib.sha256()
        for block in download():
            digest.update(block)
            part.write(block)
        part.flush()
        if part.tell() != file.bytes or digest.hexdigest() != file.sha256:
            raise DataError(
                f"{name}: damaged, or changed since the manifest: its {part.tell()} bytes have the "
                f"sha256 {digest.hexdigest()}, the manifest says {file.bytes} bytes and "
                f"{file.sha256}. Restore it or make the data again"
            )
        self._verified.add(file.sha256)
        (self.folder / (file.sha256 + PART)).rename(self.folder / file.sha256)

    def _reserve(self, size: int, part: BinaryIO) -> None:
        """Give `part` its `size` bytes on the disk, within the bound."""
        give_up_at = monotonic() + ROOM_WAIT_S
        part.truncate(0)
        while True:
            with self._alone():
                if self._make_room(size, part):
                    return
            with self._mapping:
                self._unmap(0)
            if monotonic() > give_up_at:
                raise DataError(
                    f"{self.folder}: no room for {size} bytes: the cache may hold "
                    f"{self.max_bytes} (data.cache_gb), {self._size()} are in it and in use, and "
                    f"the disk has {_free_bytes(self.folder)} left. Raise data.cache_gb, make room "
                    "on the disk, or choose another data.cache_dir"
                )
            sleep(0.1)

    def _make_room(self, size: int, part: BinaryIO) -> bool:
        """Evict what is needed for `size` more bytes; false if what is left is in use."""
        victims = self._by_last_use()
        while True:
            if self._size() + size <= self.max_bytes:
                try:
                    os.posix_fallocate(part.fileno(), 0, size)
                    return True
                except OSError as error:
                    if error.errno not in NO_ROOM:
                        raise
                    part.truncate(0)
            while True:
                victim = next(victims, None)
                if victim is None:
                    return False
                if _remove_idle(victim):
                    break

    def _by_last_use(self) -> Iterator[Path]:
        """What may be evicted, killed downloads first."""
        found = []
        for path in self._files():
            with suppress(FileNotFoundError):
                found.append((path.suffix != PART, path.stat().st_mtime_ns, path))
        return iter([path for _, _, path in sorted(found)])

    def _size(self) -> int:
        """Bytes of all files, those that are only reserved included."""
        total = 0
        for path in self._files():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def _files(self) -> Iterator[Path]:
        """Its own: the folder may have others, which neither count nor make room."""
        return (path for path in self.folder.iterdir() if OWN_NAME.fullmatch(path.name))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / ".lock").open("a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _open_locked(path: Path, operation: int) -> BinaryIO | None:
    """The file at this path, once it is locked; None if there is none, or another has the lock."""
    # NFS has exclusive locks only for a file that is open for writing.
    mode = "r+b" if operation & fcntl.LOCK_EX else "rb"
    while True:
        try:
            file: BinaryIO = path.open(mode)  # type: ignore[assignment]
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, operation)
        except BlockingIOError:
            file.close()
            return None
        if _is_at(path, file):
            return file
        # What was at this path has been removed, or renamed, before it was locked.
        file.close()


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove_idle(path: Path) -> bool:
    """Remove a file that nobody has locked; whether it was removed."""
    file = _open_locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if file is None:
        return False
    with file:
        path.unlink(missing_ok=True)
    return True


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
