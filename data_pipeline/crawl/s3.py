"""Objects of S3 and of stores that speak its protocol, through s3fs."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

import aiohttp
import s3fs
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
)

from data_pipeline.crawl.transfer import MissingError, RefusedError, TransferError, Version

# Each request asks for this much, so that much is in memory.
REQUEST_BYTES = 4 << 20
READ_BYTES = 1 << 20
PASSING = (OSError, BotoCoreError, ClientError, aiohttp.ClientError, HTTPException)


def probe(url: str, silence: float) -> Version:
    with _refusals():
        return _version(_store(silence).info(url))


def read_from(url: str, start: int, version: Version, silence: float) -> Iterator[bytes]:
    with _refusals():
        # s3fs sends If-Match with the ETag that it finds when it opens an object.
        file = _store(silence).open(url, "rb", block_size=REQUEST_BYTES, cache_type="readahead")
    with file:
        version.require(_version(file.details))
        file.seek(start)
        while True:
            with _refusals():
                block = file.read(READ_BYTES)
            if not block:
                return
            yield block


def find(pattern: str, silence: float) -> dict[str, Version]:
    """The objects under a folder, or those that match a glob pattern, by their URLs."""
    store = _store(silence)
    with _refusals():
        look = store.glob if glob.has_magic(pattern) else store.find
        found = look(pattern, detail=True)
    return {
        f"s3://{path}": _version(info) for path, info in found.items() if info["type"] == "file"
    }


def _store(silence: float) -> Any:
    """One that leaves it to its caller to ask again."""
    config = {
        "connect_timeout": silence,
        "read_timeout": silence,
        "retries": {"total_max_attempts": 1},
    }
    store = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=config)
    store.retries = 1
    return store


def _version(info: dict[str, Any]) -> Version:
    if info["type"] != "file":
        raise RefusedError("a folder; end its name with / for the archives in it")
    return Version(info["size"], info["ETag"])


@contextmanager
def _refusals() -> Iterator[None]:
    """Tell what asking again may mend from what it cannot."""
    try:
        yield
    except RefusedError:
        raise
    except FileNotFoundError as error:
        raise MissingError("no such object or bucket") from error
    except PermissionError as error:
        raise RefusedError(f"not yours to read: {error}") from error
    except s3fs.utils.FileExpired as error:
        raise RefusedError("the file has changed while it was read") from error
    except (NoCredentialsError, ParamValidationError, ValueError) as error:
        raise RefusedError(str(error)) from error
    except PASSING as error:
        raise TransferError(str(error) or type(error).__name__) from error
