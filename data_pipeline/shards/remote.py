"""Shards behind https:// or s3://, read through the cache of this machine."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from data_pipeline.crawl.remote import RemoteFile
from data_pipeline.crawl.transfer import MissingError, Version
from data_pipeline.errors import DataError
from data_pipeline.shards.cache import PREFETCHED_SHARE, Cache
from data_pipeline.shards.store import StoredFile, map_file

log = logging.getLogger(__name__)


class RemoteStore:
    """The folder of a manifest on a server. What fails is asked for again, and told on stderr.

    Raises:
        DataError: a file is gone or has changed.
        UnreachableError: the server has not answered for as long as `Patience` says.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self._url = url
        self._cache = cache
        self._has_warned = False
        self._kept: dict[str, NDArray[np.uint8]] = {}
        self._seen: dict[str, tuple[Version, bytes]] = {}

    @property
    def name(self) -> str:
        return RemoteFile(self._url).name.rstrip("/")

    def read(self, path: str) -> bytes | None:
        while True:
            remote = self._remote(path)
            try:
                remote = remote.identified()
                assert remote.version is not None
                seen = self._seen.get(path)
                if seen is None or seen[0] != remote.version:
                    self._seen[path] = seen = remote.version, b"".join(remote.blocks())
            except DataError as error:
                if isinstance(error.__cause__, MissingError):
                    return None
                if remote.version is None or not self._is_replaced(remote):
                    raise
                # A manifest that grows.
            else:
                return seen[1]

    def _is_replaced(self, remote: RemoteFile) -> bool:
        return RemoteFile(remote.url).identified().version != remote.version

    def check(self, files: Iterable[StoredFile]) -> None:
        self._cache.require_room_for(files, self.name)

    def file(self, path: str, sha256: str) -> Path:
        if sha256 not in self._kept:
            size = self._remote(path).identified().size
            with self.open(StoredFile(path, size, sha256)) as opened:
                # Who asks for a path opens it later: it must not be evicted before.
                self._kept[sha256] = map_file(opened)
        return self._cache.folder / sha256

    def open(self, file: StoredFile) -> BinaryIO:
        opened = self._cache.open(file, self._name(file), self._download(file))
        assert opened is not None, "it was waited for"
        return opened

    def map(self, file: StoredFile) -> NDArray[np.uint8]:
        return self._cache.map(file, self._name(file), self._download(file))

    def is_at_hand(self, file: StoredFile) -> bool:
        return self._cache.has_mapped(file)

    def prefetch(self, files: Iterable[StoredFile]) -> Iterable[Callable[[], None]]:
        files = list(files)
        self._warn_of_a_small_cache(files)
        tasks: list[Callable[[], None]] = []
        room = self._cache.max_bytes * PREFETCHED_SHARE
        for file in files:
            room -= file.bytes
            if room < 0:
                break
            tasks.append(partial(self._fetch_ahead, file))
        return tasks

    def _warn_of_a_small_cache(self, files: Sequence[StoredFile]) -> None:
        needed = sum(file.bytes for file in files)
        if needed > self._cache.max_bytes and not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: the %d shards needed next have %.1f GB, and the cache may hold %.1f: some "
                "will be fetched again and again; raise data.cache_gb or lower data.shuffle_shards",
                self.name,
                len(files),
                needed / 1e9,
                self._cache.max_bytes / 1e9,
            )

    def has_writer(self) -> bool | None:
        return None

    def _fetch_ahead(self, file: StoredFile) -> None:
        # Another rank of this machine may be at it: there are others to fetch.
        opened = self._cache.open(file, self._name(file), self._download(file), if_idle=True)
        if opened is not None:
            opened.close()

    def _download(self, file: StoredFile) -> Callable[[], Iterator[bytes]]:
        def blocks() -> Iterator[bytes]:
            remote = self._remote(file.path).identified()
            if remote.size != file.bytes:
                raise DataError(
                    f"{remote.name}: cut or replaced: it has {remote.size} bytes, the manifest "
                    f"says {file.bytes}. Restore it or make the data again"
                )
            yield from remote.blocks()

        return blocks

    def _name(self, file: StoredFile) -> str:
        return self._remote(file.path).name

    def _remote(self, path: str) -> RemoteFile:
        parts = urlsplit(self._url)
        return RemoteFile(parts._replace(path=f"{parts.path.rstrip('/')}/{path}").geturl())
