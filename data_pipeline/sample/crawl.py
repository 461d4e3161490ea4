"""Assemble the sample crawl and write it as gzipped WARC files."""

import gzip
import random
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.sample import planting
from data_pipeline.sample.library import LibraryPage, library_pages
from data_pipeline.sample.planting import Fetch
from data_pipeline.sample.sentences import SENTENCES

COPY_SHARE = 0.15
FOREIGN_SHARE = 0.08
JUNK_SHARE = 0.08
DATE = "2026-01-01T00:00:00Z"
PLANTED_HEADER = "X-Planted"
CUT = "cut"


@dataclass(frozen=True)
class SampleReport:
    """A sample crawl: its files, and how many documents of each kind they hold."""

    files: tuple[Path, ...]
    planted: dict[str, int]

    @property
    def documents(self) -> int:
        return sum(self.planted.values())


def make_sample_crawl(out: Path, *, pages: int, files: int, seed: int) -> SampleReport:
    """Write `files` WARC files of `pages` documentation pages, their copies, and junk.

    The bytes are a function of the Python installation, the arguments and nothing else. Each
    response names its kind in the header `X-Planted`; the last one of the last file is cut.

    Raises:
        DataError: the installation has fewer modules than `pages`.
    """
    rng = random.Random(seed)
    fetches = list(_fetches(library_pages(pages), rng))
    rng.shuffle(fetches)
    out.mkdir(parents=True, exist_ok=True)
    paths = tuple(out / f"sample-{number:05d}.warc.gz" for number in range(files))
    for number, path in enumerate(paths):
        path.write_bytes(b"".join(_members(path.name, fetches[number::files], rng)))
    cut = gzip.compress(_record(Fetch(CUT, "https://docs.example.org/cut", b""), rng), mtime=0)
    with paths[-1].open("ab") as last:
        last.write(cut[: len(cut) // 2])
    planted = Counter(fetch.planted for fetch in fetches)
    planted[CUT] = 1
    return SampleReport(paths, dict(sorted(planted.items())))


def _fetches(library: Sequence[LibraryPage], rng: random.Random) -> Iterator[Fetch]:
    for page in library:
        yield planting.original(page, rng)
    for number in range(round(COPY_SHARE * len(library))):
        copy = planting.COPIES[number % len(planting.COPIES)]
        yield copy(rng.choice(library), rng)
    languages = sorted(SENTENCES)
    for number in range(round(FOREIGN_SHARE * len(library))):
        yield planting.foreign(languages[number % len(languages)], rng)
    for number in range(round(JUNK_SHARE * len(library))):
        yield planting.JUNK[number % len(planting.JUNK)](rng)


def _members(name: str, fetches: Sequence[Fetch], rng: random.Random) -> Iterator[bytes]:
    """One gzip member per record, a warcinfo first."""
    fields = b"software: farspan sample crawl\r\nformat: WARC File Format 1.1\r\n"
    headers = {"WARC-Type": "warcinfo", "WARC-Filename": name}
    yield gzip.compress(_warc(headers, "application/warc-fields", fields, rng), mtime=0)
    for fetch in fetches:
        yield gzip.compress(_record(fetch, rng), mtime=0)


def _record(fetch: Fetch, rng: random.Random) -> bytes:
    http = (
        f"HTTP/1.1 {fetch.status}\r\nContent-Type: {fetch.content_type}\r\n"
        f"Content-Length: {len(fetch.body)}\r\n\r\n"
    )
    headers = {
        "WARC-Type": "response",
        "WARC-Target-URI": fetch.url,
        PLANTED_HEADER: fetch.planted,
    }
    block = http.encode() + fetch.body
    return _warc(headers, "application/http; msgtype=response", block, rng)


def _warc(headers: dict[str, str], content_type: str, block: bytes, rng: random.Random) -> bytes:
    """One record of the WARC 1.1 format (ISO 28500:2017, section 4)."""
    fields = {
        **headers,
        "WARC-Record-ID": f"<urn:uuid:{uuid.UUID(int=rng.getrandbits(128), version=4)}>",
        "WARC-Date": DATE,
        "Content-Type": content_type,
        "Content-Length": str(len(block)),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"WARC/1.1\r\n{lines}\r\n".encode() + block + b"\r\n\r\n"
