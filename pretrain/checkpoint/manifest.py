"""The manifest that makes a folder a checkpoint: written last, and at once.

It holds how far the run had come, size and sha256 of each file, and a sha256 of itself.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.checkpoint.target import Target

MANIFEST = "manifest.json"
SET_ASIDE = "set-aside-manifest.json"


class DamageError(Exception):
    """A checkpoint is not what its manifest says; the message names the file."""


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """
    Attributes:
        attempt: that wrote the checkpoint.
        progress: how far the run had come (`store.Progress`).
        files: by name.
    """

    attempt: int
    progress: dict[str, Any]
    files: dict[str, FileEntry]

    def to_bytes(self) -> bytes:
        content = asdict(self)
        return _dump({"sha256": _sha256_of(content), "content": content})

    @classmethod
    def read(cls, checkpoint: Target) -> "Manifest":
        """Raises DamageError."""
        place = checkpoint / MANIFEST
        try:
            raw = place.read()
        except FileNotFoundError:
            raise DamageError(f"{place} is missing") from None
        try:
            whole = json.loads(raw)
            content = whole["content"]
            is_whole = raw == _dump({"sha256": _sha256_of(content), "content": content})
        except (ValueError, KeyError, TypeError):
            is_whole = False
        if not is_whole:
            raise DamageError(f"{place} is damaged")
        return cls(
            content["attempt"],
            content["progress"],
            {name: FileEntry(**entry) for name, entry in content["files"].items()},
        )


def check_files(checkpoint: Target, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        part: of `parts` that share the files between them, the one to look at.

    Raises:
        DamageError: names the first file that differs, and how.
    """
    for name in sorted(manifest.files)[part::parts]:
        for _ in _checked(checkpoint / name, manifest.files[name]):
            pass


def attempt_prefix(attempt: int) -> str:
    """What the names of all files of an attempt begin with."""
    return f"attempt-{attempt:04d}-"


def index_name(attempt: int) -> str:
    """Of the file that says which part of which tensor lies where.

    It is the last in the order of names: rank n of those that check files together has the file
    that rank n wrote, and reads from it next.
    """
    return f"{attempt_prefix(attempt)}tensors.npz"


def read_index(checkpoint: Target, manifest: Manifest) -> bytes:
    """Raises DamageError."""
    name = index_name(manifest.attempt)
    if name not in manifest.files:
        raise DamageError(f"{checkpoint / MANIFEST} lists no {name}")
    return b"".join(_checked(checkpoint / name, manifest.files[name]))


def _checked(file: Target, expected: FileEntry) -> Iterator[bytes]:
    """The content of a file, piece by piece. Raises DamageError, at the end at the latest."""
    digest = hashlib.sha256()
    try:
        size = file.size()
        if size != expected.bytes:
            raise DamageError(f"{file} has {size} bytes, expected {expected.bytes}")
        for chunk in file.chunks():
            digest.update(chunk)
            yield chunk
    except FileNotFoundError:
        raise DamageError(f"{file} is missing") from None
    if digest.hexdigest() != expected.sha256:
        raise DamageError(f"{file} has another sha256 than {MANIFEST} says")


def _dump(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()
