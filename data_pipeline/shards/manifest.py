"""The manifest of a folder of shards: what is in it, and the hashes that prove it."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.shards.store import Store, StoredFile

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
GROWING = "manifest.growing.json"
TOKENIZER = "tokenizer.json"
# In `extra`: the first id of those that are predicted, where not all are.
PREDICTED_FROM = "predicted_from"


@dataclass(frozen=True)
class Shard:
    """One tar and its index; paths are relative to the manifest's folder."""

    path: str
    bytes: int
    sha256: str
    index: str
    index_sha256: str
    documents: int
    tokens: int

    @property
    def tar(self) -> StoredFile:
        return StoredFile(self.path, self.bytes, self.sha256)

    @property
    def index_file(self) -> StoredFile:
        header = 128  # of an .npy file with two int64 for each document
        return StoredFile(self.index, header + 16 * self.documents, self.index_sha256)


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, and the hashes that prove it.

    Attributes:
        store: where the files lie.
        unigram_entropy: nats per predicted token of a model that knows the frequency of each and
            nothing else.
        is_finished: false while more shards are written.
    """

    store: Store
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: str
    unigram_entropy: float
    shards: tuple[Shard, ...]
    extra: dict[str, Any]
    is_finished: bool = True

    @property
    def tokenizer(self) -> Path:
        """The file on this machine; it is fetched if need be."""
        return self.store.file(TOKENIZER, self.tokenizer_sha256)

    @property
    def predicted_from(self) -> int:
        """Tokens of lower ids are read, and never predicted: synthetic tasks set it."""
        return int(self.extra.get(PREDICTED_FROM, 0))

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Identifies the tokens: equal for equal shards, wherever they lie."""
        return self.prefix_sha256(len(self.shards))

    def prefix_sha256(self, shards: int) -> str:
        """Identifies the tokens of the first `shards` shards, however many have followed."""
        assert shards <= len(self.shards), "only of shards that are listed"
        hashes = "\n".join(shard.sha256 for shard in self.shards[:shards])
        return hashlib.sha256(hashes.encode()).hexdigest()


def read_manifest(store: Store, *, growing: bool) -> Manifest:
    """The manifest as it is now, checked against what can be known of its files."""
    # A run that ends puts the finished manifest in place before it removes the other.
    for name in (MANIFEST, GROWING, MANIFEST):
        content = store.read(name)
        if content is None:
            continue
        manifest = _parse(content, store, name)
        if not manifest.is_finished and not growing:
            raise DataError(
                f"{store.name}/{name}: not finished, {len(manifest.shards)} shards so far: wait "
                "for `farspan data run`, or set growing: true for this source to train on what is "
                "there and on what follows"
            )
        store.check(shard.tar for shard in manifest.shards)
        return manifest
    missing = f"{store.name}/{MANIFEST}: no such file; "
    if growing:
        raise DataError(missing + f"nor is there {GROWING}: `farspan data run` makes no shards yet")
    raise DataError(missing + "name a finished folder of `farspan data run`")


def _parse(content: bytes, store: Store, name: str) -> Manifest:
    """Raises DataError, with the `name` of the file, if this is no manifest."""
    where = f"{store.name}/{name}"
    try:
        tree = json.loads(content)
        version = tree["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{where}: format version {version}, this farspan reads {FORMAT_VERSION}; "
                "make the shards again"
            )
        return Manifest(
            store=store,
            tokenizer_sha256=tree["tokenizer"]["sha256"],
            vocab_size=tree["tokenizer"]["vocab_size"],
            eos_id=tree["tokenizer"]["eos_id"],
            dtype=tree["dtype"],
            unigram_entropy=tree["unigram_entropy"],
            shards=tuple(Shard(**shard) for shard in tree["shards"]),
            extra=tree["extra"],
            is_finished=tree.get("finished", True),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: not a manifest of farspan shards ({error!r})") from error


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Put it in place of the one before, whole; a finished one ends the growing one."""
    content = {
        "format_version": FORMAT_VERSION,
        "tokenizer": {
            "sha256": manifest.tokenizer_sha256,
            "vocab_size": manifest.vocab_size,
            "eos_id": manifest.eos_id,
        },
        "dtype": manifest.dtype,
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "unigram_entropy": manifest.unigram_entropy,
        "shards": [asdict(shard) for shard in manifest.shards],
        "extra": manifest.extra,
    }
    if not manifest.is_finished:
        content["finished"] = False
    path = folder / (MANIFEST if manifest.is_finished else GROWING)
    aside = path.with_name(f".{path.name}")
    with aside.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    if manifest.is_finished:
        (folder / GROWING).unlink(missing_ok=True)
