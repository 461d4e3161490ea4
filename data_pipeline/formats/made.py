"""A folder of shards that is made of files, as one that `farspan data run` makes of a crawl."""

import hashlib
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.crawl.local import LocalFile
from data_pipeline.errors import DataError, file_errors
from data_pipeline.run_folder import exclusive, record_plan
from data_pipeline.shards import Manifest, load_manifest
from data_pipeline.tokenize import load_tokenizer


class Made(NamedTuple):
    """Finished shards; `is_new` is false where the folder held them already."""

    manifest: Manifest
    is_new: bool


def make_shards(
    command: str,
    files: Sequence[Path],
    options: dict[str, Any],
    tokenizer: Path,
    out: Path,
    write: Callable[[dict[str, Any]], Manifest],
) -> Made:
    """Have `write` fill `out` with shards, unless it holds those of the same files and options.

    Args:
        files: all that is read, which is what `out` is made of by name and sha256.
        options: that decide the bytes of the shards.
        write: called with what the manifest is to keep in `extra`.

    Raises:
        DataError: a file that cannot be read, or a folder that cannot be written, is in use, or
            holds shards of other files or options; no document among the files.
    """
    with file_errors():
        load_tokenizer(tokenizer)
        plan = {
            "command": command,
            "inputs": {
                name: LocalFile(file).identified().identity
                for name, file in names_of(files).items()
            },
            "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
            **options,
        }
        with exclusive(out):
            record_plan(out, plan)
            if (out / "manifest.json").exists():
                made = Made(load_manifest(out), is_new=False)
            else:
                made = Made(write(plan), is_new=True)
    if not made.manifest.documents:
        raise DataError(
            f"no document in {', '.join(map(str, files))}: name other files, and another --out"
        )
    return made


def names_of(files: Sequence[Path]) -> dict[str, Path]:
    """The files in the order of their names, which begin where their paths part.

    The names tell the files apart and do not depend on where all of them lie.

    Raises:
        DataError: a file is named twice.
    """
    for first, second in pairwise(sorted(file.resolve() for file in files)):
        if first == second:
            raise DataError(
                f"{first}: is named twice; name it once, and give its shards a larger weight in "
                "data.shards to train on them more often"
            )
    # Of a link its own name counts: what it leads to, in a cache, may be called by a hash.
    paths = sorted(file.parent.resolve() / file.name for file in files)
    parent = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return {str(path.relative_to(parent)): path for path in paths}


def tokenizer_of(tokenizer: Path | None, like: str | Path | None) -> Path:
    """The tokenizer.json that is named, or that of a folder of shards.

    Raises:
        DataError: both are given or neither is, or `like` holds no finished shards.
    """
    if like is None and tokenizer is not None:
        return tokenizer
    if tokenizer is None and like is not None:
        return load_manifest(like).tokenizer
    found = "both are" if tokenizer else "none is"
    raise DataError(
        "name the tokenizer, by --tokenizer FILE or by --like SHARDS for that of other shards "
        f"(a run trains only on shards of one tokenizer); {found} given"
    )
