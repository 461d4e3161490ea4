"""Find the manifest of a folder, finished or growing, wherever the folder lies."""

from pathlib import Path

from data_pipeline.crawl.remote import SCHEMES
from data_pipeline.errors import DataError
from data_pipeline.shards.cache import Cache
from data_pipeline.shards.manifest import Manifest, read_manifest
from data_pipeline.shards.remote import RemoteStore
from data_pipeline.shards.store import LocalStore, Store


def load_manifest(
    path: str | Path, *, growing: bool = False, cache: Cache | None = None
) -> Manifest:
    """Read the manifest of a folder on this machine or behind https:// or s3://.

    On this machine all its files must be there, in their full size. The hash of the tokenizer is
    verified here, those of indices and tars when a reader first opens them.

    Args:
        growing: take one that `farspan data run` still adds shards to.
        cache: keeps what is fetched; by default one in the user's cache directory.

    Raises:
        DataError: naming the file, what was expected and what was found.
    """
    manifest = read_manifest(open_store(path, cache), growing=growing)
    if manifest.is_finished or manifest.shards:
        assert manifest.tokenizer
    return manifest


def open_store(path: str | Path, cache: Cache | None = None) -> Store:
    scheme, separator, _ = str(path).partition("://")
    if not separator:
        return LocalStore(Path(path))
    if scheme.lower() not in SCHEMES:
        raise DataError(
            f"{path}: shards are read from folders, https:// and s3://, not from {scheme}://"
        )
    return RemoteStore(str(path), cache or Cache.of())
