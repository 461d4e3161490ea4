"""Divide a folder of shards into documents to train on and documents to evaluate with.

OUT/            what is left to train on: shards like any others
OUT/held-out/   what was held back
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.crawl.transfer import RefusedError
from data_pipeline.errors import DataError, file_errors
from data_pipeline.formats.export import read_batches
from data_pipeline.run_folder import exclusive, record_plan, refuse_foreign
from data_pipeline.shards import Manifest, TokenReader, load_manifest, write_token_shards
from data_pipeline.shards.writer import TOKENS_PER_SHARD

FOLDER = "held-out"
FUNNEL = "funnel.json"
HASH_BYTES = 8
DOCUMENTS_PER_REPORT = 4096

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the documents of it that are done, and all its documents."""


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


class Divided(NamedTuple):
    """Finished shards; `is_new` is false where the folder held them already."""

    training: Manifest
    held_out: Manifest
    is_new: bool


def hold_out(
    shards: str | Path,
    out: Path,
    *,
    share: float,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    progress: Progress = _no_progress,
) -> Divided:
    """Copy each document to one side, by a hash of its tokens.

    Equal documents stay together, and so do the documents of a crawl that is cleaned again. Near
    duplicates may part: divide shards that are deduplicated. A killed call continues when it is
    repeated.

    Args:
        shards: a finished folder, or its URL.
        share: of the documents that are held back, on average.

    Raises:
        DataError: shards that are unfinished or damaged, a share that leaves one side empty, or a
            folder that holds something else.
    """
    if not 0 < share < 1:
        raise DataError(f"share = {share}: must be above 0 and below 1")
    manifest = load_manifest(shards)
    plan = {"command": "hold-out", "of": manifest.sha256, "share": share}
    with file_errors():
        # Other commands leave it: training looks there for what was held out.
        refuse_foreign(out, [FOLDER])
    with file_errors(), exclusive(out):
        record_plan(out, plan)
        if (out / "manifest.json").exists():
            return Divided(load_manifest(out), load_manifest(out / FOLDER), is_new=False)
        is_held_out = _sides(manifest, share, partial(progress, "divided"))
        if is_held_out.all() or not is_held_out.any():
            raise DataError(
                f"share = {share}: all of the {manifest.documents} documents of {shards} would go "
                "to one side: take another share, and another --out"
            )

        def write(folder: Path, chosen: NDArray[np.bool_], stage: str) -> Manifest:
            return write_token_shards(
                _documents(manifest, chosen, partial(progress, stage)),
                manifest.tokenizer,
                folder,
                tokens_per_shard=tokens_per_shard,
                extra=manifest.extra | {"hold_out": plan},
            )

        held_out = write(out / FOLDER, is_held_out, "held out")
        if (counts := _counts_of(manifest)) is not None:
            (out / FUNNEL).write_bytes(counts)
        # Last: with this manifest the folder is whole.
        return Divided(write(out, ~is_held_out, "to train on"), held_out, is_new=True)


def _counts_of(manifest: Manifest) -> bytes | None:
    try:
        return manifest.store.read(FUNNEL)
    except DataError as error:
        # Some servers answer 403 for what is missing.
        if isinstance(error.__cause__, RefusedError):
            return None
        raise


def _sides(
    manifest: Manifest, share: float, progress: Callable[[int, int], None]
) -> NDArray[np.bool_]:
    """Of each document, whether it is held out."""
    reader = TokenReader(manifest)
    count = len(reader.lengths)
    sides = np.zeros(count, bool)
    for document, length in enumerate(reader.lengths.tolist()):
        sides[document] = _place(reader.read(document, 0, length)) < share
        if (document + 1) % DOCUMENTS_PER_REPORT == 0 or document + 1 == count:
            progress(document + 1, count)
    return sides


def _documents(
    manifest: Manifest, chosen: NDArray[np.bool_], progress: Callable[[int, int], None]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Id and tokens of the chosen documents, in their order."""
    document = 0
    for batch in read_batches(manifest, lambda _, done, total: progress(done, total)):
        for name, tokens in zip(batch.ids.to_pylist(), batch.documents(), strict=True):
            if chosen[document]:
                yield name, tokens
            document += 1


def _place(tokens: NDArray[Any]) -> float:
    """From 0 up to 1: a document's hash, whatever width its tokens are stored in."""
    digest = hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "little") / 256**HASH_BYTES
