"""Clean one archive: from its records to the texts that pass every stage before deduplication.

These are signed at once, so that nobody has to read them to find duplicates.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import ledger
from data_pipeline.crawl import Archive, Page, Reject, Source
from data_pipeline.dedup.batches import Batch
from data_pipeline.dedup.inputs import Part
from data_pipeline.dedup.settings import Settings
from data_pipeline.dedup.signed import SignedFileWriter, get_ready_to_sign
from data_pipeline.examples import CHARACTERS_READ, Examples
from data_pipeline.extract import (
    GOOD_PAGE,
    ExtractError,
    call_in_time,
    call_in_time_apart,
    extract_text,
    get_ready_to_extract,
)
from data_pipeline.language import detect_language
from data_pipeline.meter import Counter
from data_pipeline.quality import Text
from data_pipeline.recipe import Recipe
from data_pipeline.stage import is_made, make_stage

DOCUMENT_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "timestamp": pa.timestamp("us", "UTC"),
        "bytes": pa.int64(),
        "text": pa.string(),
    }
)
NO_DATE = datetime.fromtimestamp(0, UTC)
ROWS_PER_WRITE = 1000
CHARACTERS_PER_WRITE = 1 << 24

# A page that the rules of the shipped recipes pass, and a text that both models of languages read.
READYING = (("text/html", GOOD_PAGE), ("text/plain", "Mi ka oe 12 nu."))

Document = Page | Reject
Rows = tuple[list[dict[str, Any]], list[dict[str, Any]]]


class Outcome(NamedTuple):
    """What became of a document before deduplication.

    Attributes:
        row: of the audit; without a stage where the text passed.
        kept: the text that passed.
        shown: the beginning of the text that the decision was about.
    """

    row: dict[str, Any]
    kept: str | None
    shown: str


@dataclass(frozen=True)
class Piece:
    """The cleaned form of one archive, a finished stage (`data_pipeline.stage`)."""

    folder: Path

    @property
    def documents(self) -> Path:
        """Texts that passed; their ids are unique in a run, see `own_ids`.

        `timestamp` is its WARC-Date; one without counts as older than all others. `bytes` are
        those of the text.
        """
        return self.folder / "documents.parquet"

    @property
    def signed(self) -> Path:
        """The same documents, signed with the recipe's settings (`dedup.signed`)."""
        return self.folder / "signed.parquet"

    @property
    def audit(self) -> Path:
        """A row per document of the archive, without a stage where its text passed."""
        return self.folder / "audit.parquet"

    @property
    def examples(self) -> Path:
        """Documents of each outcome, see `Examples.save`."""
        return self.folder / "examples.json"

    @property
    def summary(self) -> Path:
        """The archive's name, size, records by WARC type, and the sha256 of what was read."""
        return self.folder / "archive.json"


def is_cleaned(piece: Piece) -> bool:
    """Whether a piece is there and its files are what they were; any other is removed."""
    if piece.folder.is_dir() and not piece.examples.exists():
        # Made before there were examples: its audit lacks columns, too.
        shutil.rmtree(piece.folder)
    return is_made(piece.folder)


def own_ids(ids: pa.Array) -> pa.Array:
    """The documents' own ids, of those that are unique in a run: PIECE/NUMBER OWN-ID."""
    return pc.replace_substring_regex(ids, "^[^ ]* ", "").cast(pa.string())


def clean_archive(
    source: Source,
    piece: Piece,
    recipe: Recipe,
    id_header: str,
    meter: Path,
    row: int,
    is_careful: bool = False,
) -> None:
    """Write the piece of one archive; equal archives and recipes give equal bytes.

    A document that takes longer than the recipe allows ends this process (SIGPROF), as native code
    may at any time. When `is_careful`, each one is judged in a process of its own, and dropped for
    what ended that; all others have the same outcome.

    Args:
        meter: the file of a `Meter`, which counts this archive in its row `row`.

    Raises:
        DataError: the archive cannot be read to its end, or is not the one it was.
    """
    name = piece.folder.name
    archive, counter = Archive(source, id_header=id_header), Counter(meter, row)
    judged = judge_apart if is_careful else judge_in_time
    make_stage(
        piece.folder,
        lambda aside: _write(
            archive,
            Piece(aside),
            name,
            lambda document: judged(document, recipe),
            recipe.dedup.settings,
            counter,
        ),
    )


def _write(
    records: Archive,
    written: Piece,
    name: str,
    judged: Callable[[Document], Outcome],
    settings: Settings,
    counter: Counter,
) -> None:
    count = 0
    examples = Examples()
    part = Part(written.documents, written.documents, 0, 0)
    with (
        pq.ParquetWriter(written.audit, ledger.SCHEMA) as audit,
        pq.ParquetWriter(written.documents, DOCUMENT_SCHEMA) as documents,
        SignedFileWriter(written.signed, settings) as signed,
    ):
        for rows, texts in _batches(records, judged, name, counter, examples):
            count += len(rows)
            audit.write_table(pa.Table.from_pylist(rows, ledger.SCHEMA))
            passed = pa.RecordBatch.from_pylist(texts, DOCUMENT_SCHEMA)
            documents.write_batch(passed)
            signed.append(Batch(part, 0, 0, passed))
    examples.save(written.examples)
    summary = {
        "path": records.source.name,
        "bytes": records.bytes,
        "documents": count,
        "records": dict(sorted(records.records.items())),
        "sha256": records.sha256,
    }
    written.summary.write_text(json.dumps(summary))


def _batches(
    records: Archive,
    judged: Callable[[Document], Outcome],
    piece: str,
    counter: Counter,
    examples: Examples,
) -> Iterator[Rows]:
    """Audit rows and passing texts, a thousand documents at a time or fewer long ones."""
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    characters = documents = passed = kept_bytes = 0
    for number, document in enumerate(records):
        row, text, shown = judged(document)
        rows.append(row)
        examples.offer(number, row, shown, document if isinstance(document, Page) else None)
        if text is not None:
            assert isinstance(document, Page)
            texts.append(
                {
                    "id": f"{piece}/{number} {document.id}",
                    "timestamp": document.date or NO_DATE,
                    "bytes": row["text_bytes"],
                    "text": text,
                }
            )
            characters += len(text)
            kept_bytes += row["text_bytes"]
            passed += 1
        documents = number + 1
        counter.count(document.offset, documents, passed, kept_bytes)
        if len(rows) == ROWS_PER_WRITE or characters >= CHARACTERS_PER_WRITE:
            yield rows, texts
            rows, texts, characters = [], [], 0
    counter.count(records.bytes, documents, passed, kept_bytes)
    yield rows, texts


def judge_in_time(document: Document, recipe: Recipe) -> Outcome:
    """`judge`; this process is ended if it takes longer than the recipe allows."""
    outcome: Outcome = call_in_time(judge, document, recipe, seconds=recipe.extract.max_seconds)
    return outcome


def judge_apart(document: Document, recipe: Recipe) -> Outcome:
    """`judge` in a process of its own; what ends that one drops the document."""
    limit = recipe.extract.max_seconds
    try:
        outcome: Outcome = call_in_time_apart(judge, document, recipe, seconds=limit)
    except ExtractError as error:
        return _dropped(_row(document), "extract", error.reason, str(error))
    return outcome


def _row(document: Document) -> dict[str, Any]:
    row = {name: getattr(document, name) for name in ("id", "url", "file", "offset")}
    return row | ({"page_bytes": len(document.body)} if isinstance(document, Page) else {})


def _dropped(row: dict[str, Any], stage: str, reason: str, detail: str, text: str = "") -> Outcome:
    decision = {"stage": stage, "decision": ledger.DROPPED, "reason": reason}
    return Outcome({**row, **decision, "detail": detail or None}, None, text[:CHARACTERS_READ])


def judge(document: Document, recipe: Recipe) -> Outcome:
    """A document's audit row, and its text where no stage of the recipe drops it."""
    row = _row(document)
    text = ""

    def drop(stage: str, reason: str, detail: str = "") -> Outcome:
        return _dropped(row, stage, reason, detail, text)

    if isinstance(document, Reject):
        return drop("crawl", document.reason, document.detail)
    if recipe.url_blocklist and (listed := recipe.url_blocklist.judge(document.url)):
        return drop("blocklist", *listed)
    try:
        text = extract_text(document, recipe.extract.mode)
    except ExtractError as error:
        return drop("extract", error.reason, str(error))
    language, probability = detect_language(text)
    extracted = Text(text)
    row |= {
        "language": language,
        "language_probability": probability,
        "words": extracted.words.words,
        "extracted_bytes": len(text.encode()),
    }
    if probability < recipe.language.threshold:
        return drop("language", "uncertain", f"{language} with probability {probability:.2f}")
    if recipe.language.allowed and language not in recipe.language.allowed:
        return drop("language", language)
    if recipe.word_blocklist and (listed := recipe.word_blocklist.judge(text)):
        return drop("quality", *listed)
    verdict = recipe.judge_quality(extracted, language)
    row["quality_score"] = verdict.score
    left = verdict.document.text
    row["text_bytes"] = len(left.encode())
    if verdict.reason is not None:
        return drop("quality", verdict.reason)
    row["words"] = verdict.document.words.words
    text = left
    if recipe.decontamination and (overlap := recipe.decontamination.judge(text)):
        return drop("decontamination", *overlap)
    if recipe.privacy:
        text, masked = recipe.privacy.mask(text)
        row |= {f"masked_{kind}": count for kind, count in masked.items()}
        row["text_bytes"] = len(text.encode())
    return Outcome(row, text, text[:CHARACTERS_READ])


def get_ready(recipe: Recipe) -> None:
    """Load what judging takes, once for all processes that are copies of this one.

    What has to be compiled is, before a document's seconds are counted.

    Raises:
        RuntimeError: a page that is known to be good cannot be read, so that no other will be.
    """
    get_ready_to_extract(recipe.extract.mode)
    any_language = recipe.language.model_copy(update={"allowed": (), "threshold": 0.0})
    recipe = recipe.model_copy(update={"language": any_language})
    pages = [
        Page("", "", "", 0, 200, content_type, "utf-8", body.encode())
        for content_type, body in READYING
    ]
    rows = [judge(page, recipe).row for page in pages]
    pa.Table.from_pylist(rows, ledger.SCHEMA)  # imports pandas
    get_ready_to_sign()
