"""The manifest that makes a folder a checkpoint: written last, and at once.

It holds how far the run had come, size and sha256 of each file, where each part of each tensor
lies, and a sha256 of itself.
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
class Chunk:
    """A part of a tensor, stored in one piece.

    Attributes:
        file: its name.
        start: of its first byte in the file.
        offsets, sizes: which part it is, per dimension.
    """

    file: str
    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, in chunks that together are the whole.

    Attributes:
        dtype: as safetensors names it.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """
    Attributes:
        attempt: that wrote the checkpoint.
        progress: how far the run had come (`store.Progress`).
        files: by name.
        tensors: by name.
    """

    attempt: int
    progress: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, StoredTensor]

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
            {name: _stored_tensor(entry) for name, entry in content["tensors"].items()},
        )


def check_files(checkpoint: Target, manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        part: of `parts` that share the files between them, the one to look at.

    Raises:
        DamageError: names the first file that differs, and how.
    """
    for name in sorted(manifest.files)[part::parts]:
        file, expected = checkpoint / name, manifest.files[name]
        try:
            size = file.size()
            if size != expected.bytes:
                raise DamageError(f"{file} has {size} bytes, expected {expected.bytes}")
            if _sha256_of_chunks(file.chunks()) != expected.sha256:
                raise DamageError(f"{file} has another sha256 than {MANIFEST} says")
        except FileNotFoundError:
            raise DamageError(f"{file} is missing") from None


def _stored_tensor(entry: dict[str, Any]) -> StoredTensor:
    chunks = tuple(
        Chunk(chunk["file"], chunk["start"], tuple(chunk["offsets"]), tuple(chunk["sizes"]))
        for chunk in entry["chunks"]
    )
    return StoredTensor(entry["dtype"], tuple(entry["shape"]), chunks)


def _dump(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(_dump(content)).hexdigest()


def _sha256_of_chunks(chunks: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
