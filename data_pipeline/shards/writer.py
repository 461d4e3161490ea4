"""Write token shards, and list them while they grow."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import (
    GROWING,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shard,
    read_manifest,
    save_manifest,
)
from data_pipeline.shards.reader import TokenReader
from data_pipeline.shards.store import LocalStore, sha256_of
from data_pipeline.tokenize import Tokenizer, load_tokenizer

TOKENS_PER_SHARD = 1 << 24
DOCUMENTS_PER_ENCODING = 512
# An encoding takes about 200 bytes of memory per character.
CHARACTERS_PER_ENCODING = 1 << 20

Document = TypeVar("Document")
Tokens = Sequence[int] | NDArray[Any]


def write_shards(
    documents: Iterable[tuple[str, str]],
    tokenizer: Path,
    out: Path,
    *,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    extra: dict[str, Any],
) -> Manifest:
    """Tokenise (id, text) pairs into shards under `out`; equal input gives equal bytes.

    A shard is closed once it has at least `tokens_per_shard` tokens, and listed at once in a
    manifest that grows. Shards that a killed call with the same arguments has listed are kept, as
    far as they are whole and hold these documents; others that `out` holds are replaced. `extra`
    is kept in the manifest as it is.
    """
    coder = load_tokenizer(tokenizer)
    documents = iter(documents)
    return _write(
        documents, lambda rest: encode(rest, coder), tokenizer, out, tokens_per_shard, extra
    )


def write_token_shards(
    documents: Iterable[tuple[str, Tokens]],
    tokenizer: Path,
    out: Path,
    *,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    extra: dict[str, Any],
) -> Manifest:
    """Like `write_shards`, of (id, tokens) pairs.

    The tokens are those of `tokenizer`, its end-of-document token last.
    """
    return _write(iter(documents), iter, tokenizer, out, tokens_per_shard, extra)


def _write(
    documents: Iterator[tuple[str, Document]],
    to_tokens: Callable[[Iterator[tuple[str, Document]]], Iterator[tuple[str, Tokens]]],
    tokenizer: Path,
    out: Path,
    tokens_per_shard: int,
    extra: dict[str, Any],
) -> Manifest:
    manifest, before = begin(tokenizer, out, extra)
    kept, rest = _keep_shards(before, out, documents, tokens_per_shard)
    occurrences = count_tokens(replace(manifest, shards=kept))
    manifest = list_shards(manifest, out, kept, occurrences)
    writer: ShardWriter | None = None
    for number, (document_id, ids) in enumerate(to_tokens(rest), manifest.documents):
        writer = writer or ShardWriter(out / "shards", len(manifest.shards))
        tokens = np.array(ids, manifest.dtype)
        writer.add(number, document_id, tokens)
        occurrences += np.bincount(tokens, minlength=manifest.vocab_size)
        if writer.tokens >= tokens_per_shard:
            manifest = list_shards(manifest, out, (*manifest.shards, writer.close()), occurrences)
            writer = None
    if writer:
        manifest = list_shards(manifest, out, (*manifest.shards, writer.close()), occurrences)

    return finish(manifest, out)


def begin(tokenizer: Path, out: Path, extra: dict[str, Any]) -> tuple[Manifest, Manifest | None]:
    """The manifest of a folder that has no shards yet, and that of a killed call.

    The latter is the growing one of a call with the same arguments; where there is none, shards
    that the folder holds are removed.
    """
    manifest = _empty_manifest(tokenizer, out, extra)
    before = _listed_before(out, manifest)
    if before is None:
        for name in (MANIFEST, GROWING):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "shards", ignore_errors=True)
    (out / "shards").mkdir(parents=True, exist_ok=True)
    _put_tokenizer(tokenizer, manifest.tokenizer_sha256, out / TOKENIZER)
    return manifest, before


def finish(manifest: Manifest, out: Path) -> Manifest:
    """End the growing manifest, and remove what a killed call has left."""
    _remove_others(out / "shards", manifest)
    manifest = replace(manifest, is_finished=True)
    save_manifest(manifest, out)
    return manifest


def _put_tokenizer(tokenizer: Path, sha256: str, path: Path) -> None:
    """Whole at any time: who trains on shards that are listed may read it."""
    if path.is_file() and _sha256(path) == sha256:
        return
    aside = path.with_name(f".{path.name}")
    aside.write_bytes(tokenizer.read_bytes())
    aside.rename(path)


def _empty_manifest(tokenizer: Path, out: Path, extra: dict[str, Any]) -> Manifest:
    coder = load_tokenizer(tokenizer)
    return Manifest(
        store=LocalStore(out),
        tokenizer_sha256=_sha256(tokenizer),
        vocab_size=coder.vocab_size,
        eos_id=coder.eos_id,
        dtype=token_dtype(coder.vocab_size),
        unigram_entropy=0.0,
        shards=(),
        extra=extra,
        is_finished=False,
    )


def token_dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def list_shards(
    manifest: Manifest, out: Path, shards: tuple[Shard, ...], occurrences: NDArray[np.int64]
) -> Manifest:
    """Let who trains already see these shards."""
    entropy = _entropy(occurrences[manifest.predicted_from :])
    manifest = replace(manifest, shards=shards, unigram_entropy=entropy)
    save_manifest(manifest, out)
    return manifest


def _listed_before(out: Path, manifest: Manifest) -> Manifest | None:
    """The growing manifest that a killed call with the same arguments has left."""
    if (out / MANIFEST).exists() or not (out / GROWING).exists():
        return None
    try:
        before = read_manifest(LocalStore(out), growing=True)
    except DataError:
        return None
    extra = json.loads(json.dumps(manifest.extra))
    expected = replace(
        manifest,
        store=before.store,
        shards=before.shards,
        unigram_entropy=before.unigram_entropy,
        extra=extra,
    )
    return before if before == expected else None


def _keep_shards(
    before: Manifest | None,
    out: Path,
    documents: Iterator[tuple[str, Document]],
    tokens_per_shard: int,
) -> tuple[tuple[Shard, ...], Iterator[tuple[str, Document]]]:
    """Those of the shards listed before that begin the documents, and the documents that follow."""
    kept: tuple[Shard, ...] = ()
    for shard in before.shards if before else ():
        if not is_whole(out, shard) or not _is_closed(out / shard.index, tokens_per_shard):
            break
        these = list(islice(documents, shard.documents))
        if [name for name, _ in these] != _ids(out, shard):
            return kept, chain(these, documents)
        kept = (*kept, shard)
    return kept, documents


def is_whole(out: Path, shard: Shard) -> bool:
    wanted = ((shard.path, shard.sha256), (shard.index, shard.index_sha256))
    return all((out / path).is_file() and _sha256(out / path) == sha256 for path, sha256 in wanted)


def _is_closed(index: Path, tokens_per_shard: int) -> bool:
    """Whether a shard ends where one of `tokens_per_shard` does, even if documents follow."""
    lengths = np.load(index)[1]
    return bool(lengths.sum() >= tokens_per_shard > lengths[:-1].sum())


def _ids(out: Path, shard: Shard) -> list[str]:
    path = (out / shard.path).with_suffix(".ids.parquet")
    try:
        ids: list[str] = pq.read_table(path)["id"].to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        return []
    return ids


def count_tokens(manifest: Manifest) -> NDArray[np.int64]:
    """Of each token, in the shards of a manifest."""
    occurrences = np.zeros(manifest.vocab_size, np.int64)
    reader = TokenReader(manifest)
    for document in range(manifest.documents):
        tokens = reader.read(document, 0, reader.lengths[document])
        occurrences += np.bincount(tokens, minlength=manifest.vocab_size)
    return occurrences


def _remove_others(folder: Path, manifest: Manifest) -> None:
    """What a killed call has left and this one has not replaced."""
    names = {Path(shard.path).with_suffix("").name for shard in manifest.shards}
    for path in folder.iterdir():
        if path.name.partition(".")[0] not in names:
            path.unlink()


def _entropy(occurrences: NDArray[np.int64]) -> float:
    """In nats, of the distribution that these counts make."""
    share = occurrences[occurrences > 0] / max(1, occurrences.sum())
    return float(-(share * np.log(share)).sum())


def encode(
    documents: Iterable[tuple[str, str]], coder: Tokenizer
) -> Iterator[tuple[str, list[int]]]:
    """The tokens of each (id, text) pair, the end of the document last."""
    for batch in _batches(documents):
        names, texts = zip(*batch, strict=True)
        for name, ids in zip(names, coder.encode_batch(texts), strict=True):
            yield name, [*ids, coder.eos_id]


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


class ShardWriter:
    """One open tar; `close` gives its line of the manifest."""

    def __init__(self, folder: Path, number: int) -> None:
        self._path = folder / f"shard-{number:05d}.tar"
        # Aside: a shard of this name may be listed, and be read.
        self._aside = folder / f".{self._path.name}"
        self._file = self._aside.open("wb")
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
        ids = self._path.with_suffix(".ids.parquet")
        pq.write_table(pa.table({"id": self._ids}), ids)
        for path in (self._aside, index, ids):
            _sync(path)
        self._aside.rename(self._path)
        return Shard(
            path=f"shards/{self._path.name}",
            bytes=self._path.stat().st_size,
            sha256=_sha256(self._path),
            index=f"shards/{index.name}",
            index_sha256=_sha256(index),
            documents=len(self._lengths),
            tokens=self.tokens,
        )


def _sync(path: Path) -> None:
    """To the disk: a shard that is listed outlives the machine's crash."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha256_of(file)
