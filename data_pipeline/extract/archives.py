"""The texts of whole archives as one JSONL file."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipeline.crawl import CRAWL_URL, Archive, Page, Reject, Source, find_archives
from data_pipeline.errors import DataError, file_errors
from data_pipeline.extract.isolation import (
    CRASHED,
    MAX_SECONDS,
    TOO_SLOW,
    call_in_time,
    call_in_time_apart,
)
from data_pipeline.extract.ready import get_ready_to_extract
from data_pipeline.extract.text import ExtractError, Mode, extract_text
from data_pipeline.workers import do_each

PAGES = "pages"
AGAIN = "Run the same command again with more memory, or with fewer other processes beside it"
Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the parts of it that are done, and all its parts."""


class _Reading(NamedTuple):
    """How pages are read."""

    mode: Mode
    id_header: str
    max_seconds: float


def extract_archives(
    inputs: Sequence[str],
    out: Path,
    *,
    mode: Mode = "fast",
    id_header: str = "WARC-Record-ID",
    crawl_url: str = CRAWL_URL,
    max_seconds: float = MAX_SECONDS,
    progress: Progress = lambda stage, done, total: None,
) -> Counter[str]:
    """Write {"id", "url", "text"} for every page with text, and count documents by outcome.

    The file appears once it is complete. Outcomes are `pages`, written ones, and reasons for
    those that are not. A page that takes more than `max_seconds` of CPU, or crashes the parser, is
    left out, and a warning names it.

    Raises:
        DataError: an input that does not exist or cannot be read, or an `out` that cannot be
            written or is not named .jsonl.
    """
    if out.suffix != ".jsonl":
        raise DataError(f"{out}: the file to write is plain JSONL; give it a name in .jsonl")
    with file_errors():
        if out.is_dir():
            raise DataError(f"{out}: is a folder; name the file to write")
        sources = find_archives(inputs, crawl_url)
        return _extract_archives(sources, out, _Reading(mode, id_header, max_seconds), progress)


def _extract_archives(
    sources: Sequence[Source], out: Path, reading: _Reading, progress: Progress
) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.write_bytes(b"")
    progress("extract", 0, len(sources))
    get_ready_to_extract(reading.mode)
    for done, source in enumerate(sources, 1):
        task = (source, aside, aside.stat().st_size, reading)
        for counts, hostile in do_each(_append_texts, [task], 1, advice=AGAIN):
            outcomes.update(counts)
            for line in hostile:
                print(f"warning: {line}", file=sys.stderr, flush=True)
        progress("extract", done, len(sources))
    aside.rename(out)
    return outcomes


def _append_texts(
    source: Source, aside: Path, start: int, reading: _Reading, is_careful: bool = False
) -> tuple[Counter[str], list[str]]:
    """Write the texts of an archive after the first `start` bytes of a file.

    A page that takes too long ends this process, as native code may at any time. When `is_careful`,
    each one is read in a process of its own.

    Returns:
        Documents by outcome, and a line for each page that ended its process.
    """
    outcomes: Counter[str] = Counter()
    hostile = []
    call = call_in_time_apart if is_careful else call_in_time
    os.truncate(aside, start)  # what a process before this one has left
    with aside.open("a", encoding="utf-8") as file:
        for document in Archive(source, id_header=reading.id_header):
            if isinstance(document, Reject):
                outcomes[f"crawl: {document.reason}"] += 1
                continue
            try:
                text = call(extract_text, document, reading.mode, seconds=reading.max_seconds)
            except ExtractError as error:
                outcomes[f"extract: {error.reason}"] += 1
                if error.reason in (TOO_SLOW, CRASHED):
                    hostile.append(f"{_place(document)}: {error.reason}, {error}; it is left out")
                continue
            row = {"id": document.id, "url": document.url, "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            outcomes[PAGES] += 1
    return outcomes, hostile


def _place(page: Page) -> str:
    return f"{page.file}, byte {page.offset}, {page.id} ({page.url})"
