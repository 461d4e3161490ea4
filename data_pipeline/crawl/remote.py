"""A file on a server, read over as many connections as it takes."""

import logging
import posixpath
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import sleep
from typing import TypeVar
from urllib.parse import urlsplit

from data_pipeline.crawl.reader import Blocks, Reader
from data_pipeline.crawl.transfer import RefusedError, Store, TransferError, Transport, Version
from data_pipeline.errors import DataError

SCHEMES = ("https", "http", "s3")
LONGEST_RETRY_AFTER = 600.0
# What signs an address for a while is no part of what it names, and a secret besides.
SIGNATURES = ("x-amz-", "x-goog-")

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class UnreachableError(DataError):
    """A file that cannot be read now, and may be later."""

    exit_code = 1


@dataclass(frozen=True)
class Patience:
    """How long a server that fails is asked again.

    Attributes:
        attempts: in a row without a byte, before the file is given up.
        first_wait: seconds before the second attempt; the wait doubles up to `longest_wait`.
        silence: seconds without a byte after which a connection counts as broken.
    """

    attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0
    silence: float = 60.0

    def wait(self, failures: int, retry_after: float) -> float:
        """Seconds to wait after so many failures; workers that failed together come apart."""
        longest = min(self.longest_wait, self.first_wait * 2 ** (failures - 1))
        return max(random.uniform(0.5, 1.0) * longest, min(retry_after, LONGEST_RETRY_AFTER))


@dataclass(frozen=True)
class RemoteFile:
    """A file behind https://, http:// or s3://.

    Attributes:
        version: of the file to read; without one, of the file that is found first.
    """

    url: str
    version: Version | None = None
    patience: Patience = Patience()

    @property
    def name(self) -> str:
        """The URL without what is secret in it."""
        parts = urlsplit(self.url)
        query = "&".join(
            pair for pair in parts.query.split("&") if not pair.lower().startswith(SIGNATURES)
        )
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query).geturl()

    @property
    def basename(self) -> str:
        parts = urlsplit(self.url)
        return posixpath.basename(parts.path) or parts.netloc

    @property
    def size(self) -> int:
        """In bytes."""
        assert self.version is not None, "asked for after identified()"
        return self.version.size

    @property
    def identity(self) -> dict[str, str | int]:
        """What must not change between two starts of a run."""
        assert self.version is not None, "asked for after identified()"
        version = self.version
        stamps = {"etag": version.etag, "last_modified": version.last_modified}
        return {"bytes": version.size} | {key: stamp for key, stamp in stamps.items() if stamp}

    def identified(self) -> "RemoteFile":
        """This file with its version.

        Raises:
            DataError: no such file, or no way to tell whether it changes.
            UnreachableError: the server does not answer.
        """
        if self.version is not None:
            return self
        silence = self.patience.silence
        return replace(self, version=self._ask(lambda: self._transport.probe(self.url, silence)))

    def matches(self) -> list["RemoteFile"]:
        """The files in this folder of a bucket, or those that match this glob pattern, sorted.

        Raises:
            DataError, UnreachableError: as `identified` does.
        """
        found = self._ask(lambda: self._s3.find(self.url, self.patience.silence))
        return [replace(self, url=url, version=version) for url, version in sorted(found.items())]

    def open(self, start: int = 0) -> Reader:
        known = self.identified()
        assert known.version is not None
        return Reader(known.blocks, known.version.size, start)

    def blocks(self, start: int = 0) -> Blocks:
        """The file from byte `start` on, without a gap where connections broke.

        Raises:
            DataError: the file is gone, or has changed.
            UnreachableError: attempts without a byte have reached their limit.
        """
        version, position, failures = self.version, start, 0
        assert version is not None, "read after identified()"
        while position < version.size:
            try:
                for block in self._connect(position, version):
                    position, failures = position + len(block), 0
                    yield block
                if position < version.size:
                    raise TransferError("the connection ended early")
            except RefusedError as error:
                raise DataError(f"{self.name}, byte {position}: {error}") from error
            except TransferError as error:
                failures += 1
                self._wait(failures, f"{self.name}, byte {position}", error)

    def verify(self, sha256: str) -> None:
        """Nothing is left to check: every answer was of the version asked for."""

    def _connect(self, start: int, version: Version) -> Iterator[bytes]:
        """The blocks that one connection gives, none empty and no byte beyond the file's end."""
        position = start
        for block in self._transport.read_from(self.url, start, version, self.patience.silence):
            if inside := block[: version.size - position]:
                position += len(inside)
                yield inside

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        failures = 0
        while True:
            try:
                return question()
            except RefusedError as error:
                raise DataError(f"{self.name}: {error}") from error
            except TransferError as error:
                failures += 1
                self._wait(failures, self.name, error)

    def _wait(self, failures: int, where: str, error: TransferError) -> None:
        if failures >= self.patience.attempts:
            raise UnreachableError(
                f"{where}: {error} (attempt {failures} of {self.patience.attempts}). What was "
                "finished is kept: the same command continues"
            ) from error
        seconds = self.patience.wait(failures, error.retry_after)
        can_resume = self.version is None or self.version.has_ranges
        how = "" if can_resume else ", from the first byte: the server sends no parts of files"
        log.warning("%s: %s; trying again in %.1f s%s", where, error, seconds, how)
        sleep(seconds)

    @property
    def _transport(self) -> Transport:
        if self.url.lower().startswith("s3://"):
            return self._s3
        from data_pipeline.crawl import web

        return web

    @property
    def _s3(self) -> Store:
        try:
            from data_pipeline.crawl import s3
        except ImportError as error:
            raise DataError(f"{self.name}: s3:// needs s3fs: pip install 'farspan[s3]'") from error
        return s3
