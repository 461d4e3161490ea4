"""Token shards on disk: WebDataset tars of token arrays, an index beside each, one manifest.

DIR/manifest.json                  written last: a folder without it is not finished
DIR/tokenizer.json
DIR/shards/shard-00000.tar         one .npy member per document, its tokens and end-of-document
DIR/shards/shard-00000.index.npy   int64 [2, documents]: byte offset of the tokens, their number
DIR/shards/shard-00000.ids.parquet the documents' ids, in the same order
"""

import hashlib
import io
import json
import os
import shutil
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.tokenize import load_tokenizer

FORMAT_VERSION = 1
DOCUMENTS_PER_ENCODING = 512
# An encoding takes about 200 bytes of memory per character.
CHARACTERS_PER_ENCODING = 1 << 22
# A mapped file holds a file descriptor, of which a process commonly has 1024.
MAPPED_SHARDS = 512


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


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds, and the hashes that prove it.

    Attributes:
        unigram_entropy: nats per token of a model that knows the frequency of each token and
            nothing else.
    """

    root: Path
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: str
    unigram_entropy: float
    shards: tuple[Shard, ...]
    extra: dict[str, Any]

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def sha256(self) -> str:
        """Identifies the tokens: equal for equal shards, wherever they lie."""
        hashes = "\n".join(shard.sha256 for shard in self.shards)
        return hashlib.sha256(hashes.encode()).hexdigest()


def write_shards(
    documents: Iterable[tuple[str, str]],
    tokenizer: Path,
    out: Path,
    *,
    tokens_per_shard: int = 1 << 24,
    extra: dict[str, Any],
) -> Manifest:
    """Tokenise (id, text) pairs into shards under `out`; equal input gives equal bytes.

    Shards that `out` holds already are replaced. A shard is closed once it has at least
    `tokens_per_shard` tokens; `extra` is kept in the manifest as it is.
    """
    coder = load_tokenizer(tokenizer)
    dtype = np.dtype(np.uint16 if coder.vocab_size <= 1 << 16 else np.uint32)
    tokenizer_json = tokenizer.read_bytes()
    folder = out / "shards"
    (out / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (out / "tokenizer.json").write_bytes(tokenizer_json)

    shards: list[Shard] = []
    occurrences = np.zeros(coder.vocab_size, np.int64)
    writer: _ShardWriter | None = None
    for number, (document_id, ids) in enumerate(_encode(documents, coder.encode_batch)):
        writer = writer or _ShardWriter(folder, len(shards))
        tokens = np.array([*ids, coder.eos_id], dtype)
        writer.add(number, document_id, tokens)
        occurrences += np.bincount(tokens, minlength=coder.vocab_size)
        if writer.tokens >= tokens_per_shard:
            shards.append(writer.close())
            writer = None
    if writer:
        shards.append(writer.close())

    manifest = Manifest(
        root=out,
        tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
        vocab_size=coder.vocab_size,
        eos_id=coder.eos_id,
        dtype=dtype.name,
        unigram_entropy=_entropy(occurrences),
        shards=tuple(shards),
        extra=extra,
    )
    _save_manifest(manifest)
    return manifest


def _entropy(occurrences: NDArray[np.int64]) -> float:
    """In nats, of the distribution that these counts make."""
    share = occurrences[occurrences > 0] / max(1, occurrences.sum())
    return float(-(share * np.log(share)).sum())


def _encode(
    documents: Iterable[tuple[str, str]], encode_batch: Callable[[list[str]], list[list[int]]]
) -> Iterator[tuple[str, list[int]]]:
    for batch in _batches(documents):
        names, texts = zip(*batch, strict=True)
        yield from zip(names, encode_batch(list(texts)), strict=True)


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if len(batch) == DOCUMENTS_PER_ENCODING or characters >= CHARACTERS_PER_ENCODING:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """One open tar; `close` gives its line of the manifest."""

    def __init__(self, folder: Path, number: int) -> None:
        self._path = folder / f"shard-{number:05d}.tar"
        self._file = self._path.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._offsets: list[int] = []
        self._lengths: list[int] = []
        self._ids: list[str] = []
        self.tokens = 0

    def add(self, number: int, document_id: str, tokens: NDArray[Any]) -> None:
        payload = io.BytesIO()
        np.lib.format.write_array(payload, tokens, version=(1, 0))
        member = tarfile.TarInfo(f"{number:012d}.npy")
        member.size = payload.tell()
        payload.seek(0)
        tar_header = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(member, payload)
        self._offsets.append(tar_header + member.size - tokens.nbytes)
        self._lengths.append(len(tokens))
        self._ids.append(document_id)
        self.tokens += len(tokens)

    def close(self) -> Shard:
        self._tar.close()
        self._file.close()
        index = self._path.with_suffix(".index.npy")
        np.save(index, np.array([self._offsets, self._lengths], np.int64))
        pq.write_table(pa.table({"id": self._ids}), self._path.with_suffix(".ids.parquet"))
        return Shard(
            path=f"shards/{self._path.name}",
            bytes=self._path.stat().st_size,
            sha256=_sha256(self._path),
            index=f"shards/{index.name}",
            index_sha256=_sha256(index),
            documents=len(self._lengths),
            tokens=self.tokens,
        )


def _save_manifest(manifest: Manifest) -> None:
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
    path = manifest.root / "manifest.json"
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def load_manifest(path: str | Path) -> Manifest:
    """Read the manifest of the folder `path`; all its files must be there, in their full size.

    The hashes of the tokenizer and the indices are verified here or by `TokenReader`, those of the
    tars when a reader first opens them.

    Raises:
        DataError: naming the file, what was expected and what was found.
    """
    root = Path(path)
    file = root / "manifest.json"
    if not file.is_file():
        raise DataError(f"{file}: no such file; name a finished folder of `farspan data run`")
    try:
        content = json.loads(file.read_text())
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{file}: format version {version}, this farspan reads {FORMAT_VERSION}; "
                "make the shards again"
            )
        manifest = Manifest(
            root=root,
            tokenizer_sha256=content["tokenizer"]["sha256"],
            vocab_size=content["tokenizer"]["vocab_size"],
            eos_id=content["tokenizer"]["eos_id"],
            dtype=content["dtype"],
            unigram_entropy=content["unigram_entropy"],
            shards=tuple(Shard(**shard) for shard in content["shards"]),
            extra=content["extra"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a manifest of farspan shards ({error!r})") from error
    _verify(manifest.tokenizer, manifest.tokenizer_sha256)
    for shard in manifest.shards:
        _verify_size(root / shard.path, shard.bytes)
    return manifest


class TokenReader:
    """Random access to the documents of a manifest, numbered from 0 in the order of the shards.

    Costs 16 bytes of memory per document. The first access to a tar reads all of it once per
    process to verify its hash, about 50 ms for the 32 MB of a default shard.

    Attributes:
        lengths: [documents] int64, tokens of each document with its end-of-document token.
    """

    def __init__(self, manifest: Manifest) -> None:
        indices = [_load_index(manifest.root, shard) for shard in manifest.shards]
        offsets, self.lengths = np.concatenate([np.zeros((2, 0), np.int64), *indices], axis=1)
        self._dtype = np.dtype(manifest.dtype)
        self._first_token = offsets // self._dtype.itemsize
        self._shards = [(manifest.root / shard.path, shard.sha256) for shard in manifest.shards]
        self._documents_up_to = list(accumulate(shard.documents for shard in manifest.shards))

    def read(self, document: int, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop) of a document, up to its end, as a view of the mapped tar."""
        shard = bisect_right(self._documents_up_to, document)
        first = self._first_token[document]
        stop = min(stop, self.lengths[document])
        return _map_shard(*self._shards[shard], self._dtype)[first + start : first + stop]


def _load_index(root: Path, shard: Shard) -> NDArray[np.int64]:
    path = root / shard.index
    _verify(path, shard.index_sha256)
    index: NDArray[np.int64] = np.load(path)
    return index


def _verify(path: Path, sha256: str) -> None:
    _require_file(path)
    found = _sha256(path)
    if found != sha256:
        raise DataError(
            f"{path}: damaged or replaced: its sha256 is {found}, the manifest says {sha256}. "
            "Restore it or make the data again"
        )


def _verify_size(path: Path, size: int) -> None:
    _require_file(path)
    found = path.stat().st_size
    if found != size:
        raise DataError(
            f"{path}: cut or replaced: it has {found} bytes, the manifest says {size}. "
            "Restore it or make the data again"
        )


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(
            f"{path}: missing, though the manifest lists it. Restore it or make the data again"
        )


# Keyed by the hash too, so that shards made again at the same place are verified again.
_verify_once = cache(_verify)


@lru_cache(maxsize=MAPPED_SHARDS)
def _map_shard(path: Path, sha256: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    _verify_once(path, sha256)
    # Tokens are aligned: a tar has blocks of 512 bytes, and .npy pads its header to 64.
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
