"""What a user names as input, resolved to the archive files behind it."""

import glob
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.crawl.common_crawl import CRAWL_URL, SYNTAX, files_of, is_crawl
from data_pipeline.crawl.local import LocalFile
from data_pipeline.crawl.reader import Reader
from data_pipeline.crawl.remote import SCHEMES, RemoteFile
from data_pipeline.errors import DataError

ARCHIVE_SUFFIXES = (".warc.gz", ".warc", ".wet.gz", ".wet")
# Requests of a few bytes each: more would only be throttled.
CONNECTIONS = 8

Source = LocalFile | RemoteFile


def find_archives(inputs: Sequence[str], crawl_url: str = CRAWL_URL) -> list[Source]:
    """Resolve what names archives to files, each once, in the order given.

    Args:
        inputs: paths, folders and glob patterns, on this machine or in s3://; https:// and
            http:// URLs; crawls of Common Crawl (`common_crawl.SYNTAX`), unless a file or folder
            of that name is here.
        crawl_url: where crawls are found.

    Raises:
        DataError: nothing of that name, a pattern or folder without an archive, or a kind of URL
            that cannot be read.
    """
    found: dict[str, Source] = {}
    for name in inputs:
        found.update((source.name, source) for source in _resolve(name, crawl_url))
    return list(found.values())


def identify(sources: Sequence[Source], progress: Callable[[int, int], None]) -> list[Source]:
    """Each source with what tells its content from any other; remote ones a few at a time.

    Args:
        progress: called with the number of sources that are done, and of all.

    Raises:
        DataError: one that is not there, cannot be read or not be told from a changed one.
    """
    progress(0, len(sources))
    identified: list[Source] = []
    remote = [source for source in sources if isinstance(source, RemoteFile)]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        answers = pool.map(RemoteFile.identified, remote)
        try:
            for done, source in enumerate(sources, 1):
                if isinstance(source, LocalFile):
                    identified.append(source.identified())
                else:
                    identified.append(next(answers))
                progress(done, len(sources))
        finally:
            pool.shutdown(cancel_futures=True)
    return identified


def _resolve(name: str, crawl_url: str) -> list[Source]:
    scheme, separator, _ = name.partition("://")
    if separator:
        return _resolve_url(name, scheme.lower())
    if is_crawl(name) and not Path(name).exists():
        return [source_named(place) for place in files_of(name, crawl_url, _open)]
    return _resolve_path(name)


def _open(place: str) -> Reader:
    return source_named(place).open()


def source_named(place: str) -> Source:
    """The file at a path or URL, as an audit names it."""
    return RemoteFile(place) if "://" in place else LocalFile(Path(place))


def _resolve_url(url: str, scheme: str) -> list[Source]:
    if scheme not in SCHEMES:
        allowed = ", ".join(f"{known}://" for known in SCHEMES)
        raise DataError(f"{url}: not a URL that can be read; allowed: {allowed}")
    named = RemoteFile(url)
    is_folder = url.endswith("/")
    if scheme != "s3" or not (is_folder or glob.has_magic(url)):
        return [named]
    files: list[Source] = [
        file
        for file in named.matches()
        if not is_folder or file.basename.endswith(ARCHIVE_SUFFIXES)
    ]
    if not files:
        raise DataError(_nothing_there(url) if is_folder else _nothing_matches(url))
    return files


def _resolve_path(name: str) -> list[Source]:
    path = Path(name)
    if path.is_dir():
        matches = sorted(p for p in path.rglob("*") if p.name.endswith(ARCHIVE_SUFFIXES))
    elif path.exists():
        matches = [path]
    else:
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    files = [match.resolve() for match in matches if match.is_file()]
    if not files:
        raise DataError(_no_file(name, path))
    return [LocalFile(file) for file in files]


def _no_file(name: str, path: Path) -> str:
    if path.is_dir():
        return _nothing_there(name)
    if glob.has_magic(name):
        return _nothing_matches(name)
    if path.exists():
        return f"{name}: not a regular file"
    hint = f" (files of Common Crawl are {SYNTAX})" if name.startswith("CC-MAIN-") else ""
    return f"{name}: no such file{hint}"


def _nothing_there(folder: str) -> str:
    suffixes = ", ".join(ARCHIVE_SUFFIXES)
    return f"{folder}: no web archive in this folder (a name ends in {suffixes})"


def _nothing_matches(pattern: str) -> str:
    return f"{pattern}: no file matches this pattern"
