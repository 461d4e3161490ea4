"""The texts of whole archives as one JSONL file."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.crawl import CRAWL_URL, Archive, Reject, Source, find_archives
from data_pipeline.errors import DataError, file_errors
from data_pipeline.extract.text import ExtractError, Mode, extract_text

PAGES = "pages"
Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the parts of it that are done, and all its parts."""


def extract_archives(
    inputs: Sequence[str],
    out: Path,
    *,
    mode: Mode = "fast",
    id_header: str = "WARC-Record-ID",
    crawl_url: str = CRAWL_URL,
    progress: Progress = lambda stage, done, total: None,
) -> Counter[str]:
    """Write {"id", "url", "text"} for every page with text, and count documents by outcome.

    The file appears once it is complete. Outcomes are `pages`, written ones, and reasons for
    those that are not.

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
        return _extract_archives(sources, out, mode, id_header, progress)


def _extract_archives(
    sources: Sequence[Source], out: Path, mode: Mode, id_header: str, progress: Progress
) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    progress("extract", 0, len(sources))
    with aside.open("w", encoding="utf-8") as file:
        for done, source in enumerate(sources, 1):
            for document in Archive(source, id_header=id_header):
                if isinstance(document, Reject):
                    outcomes[f"crawl: {document.reason}"] += 1
                    continue
                try:
                    text = extract_text(document, mode)
                except ExtractError as error:
                    outcomes[f"extract: {error.reason}"] += 1
                    continue
                row = {"id": document.id, "url": document.url, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                outcomes[PAGES] += 1
            progress("extract", done, len(sources))
    aside.rename(out)
    return outcomes
