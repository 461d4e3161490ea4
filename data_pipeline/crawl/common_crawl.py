"""The crawls of Common Crawl by their names: CC-MAIN-2024-10, or some files of one."""

import gzip
import re
import zlib
from collections.abc import Callable

from data_pipeline.crawl.reader import Reader
from data_pipeline.errors import DataError

CRAWL_URL = "https://data.commoncrawl.org"
SYNTAX = "CC-MAIN-YYYY-WW[/warc|/wet][:FIRST[-LAST]]"
CRAWL = re.compile(r"(CC-MAIN-\d{4}-\d{2})(?:/(warc|wet))?(?::(\d+)(?:-(\d+))?)?")


def is_crawl(name: str) -> bool:
    return CRAWL.fullmatch(name) is not None


def files_of(name: str, crawl_url: str, open_file: Callable[[str], Reader]) -> list[str]:
    """Places of a crawl's files, in the order in which the crawl lists them.

    Args:
        name: as `SYNTAX` says; WARC files by default, numbered from 0, both ends included.
        crawl_url: where the folder `crawl-data` lies.
        open_file: opens a file by its place.

    Raises:
        DataError: no such crawl, or a file number that it does not have.
    """
    match = CRAWL.fullmatch(name)
    assert match is not None, "a name that is_crawl knows"
    crawl, kind, first, last = match[1], match[2] or "warc", match[3], match[4]
    base = crawl_url.rstrip("/")
    listing = f"{base}/crawl-data/{crawl}/{kind}.paths.gz"
    try:
        with open_file(listing) as reader:
            paths = gzip.decompress(reader.read(0, reader.size)).decode().split()
    except DataError as error:
        raise type(error)(f"{name}: its files are listed at {error}") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{name}: {listing} is not a list of paths in gzip: {error}") from error
    begin = int(first) if first else 0
    end = int(last or first) if first else len(paths) - 1
    if not begin <= end < len(paths):
        raise DataError(
            f"{name}: {crawl} has {len(paths)} {kind.upper()} files, 0 to {len(paths) - 1}; "
            f"write {SYNTAX}"
        )
    return [f"{base}/{path}" for path in paths[begin : end + 1]]
