"""What every protocol says of a file on a server: which one it is, and why it cannot be read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol


class RefusedError(Exception):
    """What a server answers, where asking again would not help."""


class MissingError(RefusedError):
    """There is no such file."""


class TransferError(Exception):
    """A connection that failed or ended early; `retry_after` is the wait the server asks for."""

    def __init__(self, detail: str, retry_after: float = 0.0) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Version:
    """What tells a file from the one that takes its place.

    Attributes:
        size: bytes.
        etag: its ETag, in quotes as the server writes it.
        last_modified: only where there is no strong ETag (RFC 9110, section 8.8.3).
    """

    size: int
    etag: str | None
    last_modified: str | None = None
    has_ranges: bool = field(default=True, compare=False)

    @property
    def has_strong_etag(self) -> bool:
        return self.etag is not None and not self.etag.startswith("W/")

    def require(self, found: "Version") -> None:
        """Raises RefusedError if the file found is not this one."""
        if found != self:
            raise RefusedError(f"the file has changed: it was {self}, and is {found} now")

    def __str__(self) -> str:
        stamps = [stamp for stamp in (self.etag, self.last_modified) if stamp is not None]
        return " ".join([f"{self.size} bytes", *stamps])


class Transport(Protocol):
    """One protocol's way to a file; raises RefusedError and TransferError, and no OSError."""

    def probe(self, url: str, silence: float) -> Version:
        """The file as it is now."""

    def read_from(self, url: str, start: int, version: Version, silence: float) -> Iterator[bytes]:
        """The bytes of this very version from `start` on, as far as one connection goes."""


class Store(Transport, Protocol):
    """A protocol whose servers list what they hold."""

    def find(self, pattern: str, silence: float) -> dict[str, Version]:
        """The files in a folder, or those that match a glob pattern, by their URLs."""
