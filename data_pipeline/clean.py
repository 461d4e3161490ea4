"""Clean one archive: from its records to the texts that pass every stage before deduplication."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import ledger
from data_pipeline.crawl import Archive, Page, Reject, Source
from data_pipeline.extract import ExtractError, extract_text
from data_pipeline.language import detect_language
from data_pipeline.meter import Counter
from data_pipeline.quality import Text
from data_pipeline.recipe import Recipe
from data_pipeline.stage import make_stage

DOCUMENT_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "document_id": pa.string(),
        "timestamp": pa.timestamp("us", "UTC"),
        "text": pa.string(),
    }
)
NO_DATE = datetime.fromtimestamp(0, UTC)
ROWS_PER_WRITE = 1000
CHARACTERS_PER_WRITE = 1 << 24


@dataclass(frozen=True)
class Piece:
    """The cleaned form of one archive, a finished stage (`data_pipeline.stage`)."""

    folder: Path

    @property
    def documents(self) -> Path:
        """Texts that passed; `id` is unique in a run, `document_id` is the document's own.

        `timestamp` is its WARC-Date; one without counts as older than all others.
        """
        return self.folder / "documents.parquet"

    @property
    def audit(self) -> Path:
        """A row per document of the archive, without a stage where its text passed."""
        return self.folder / "audit.parquet"

    @property
    def summary(self) -> Path:
        """The archive's name, size, records by WARC type, and the sha256 of what was read."""
        return self.folder / "archive.json"


def clean_archive(
    source: Source, piece: Piece, recipe: Recipe, id_header: str, meter: Path, row: int
) -> None:
    """Write the piece of one archive; equal archives and recipes give equal bytes.

    Args:
        meter: the file of a `Meter`, which counts this archive in its row `row`.

    Raises:
        DataError: the archive cannot be read to its end, or is not the one it was.
    """
    name = piece.folder.name
    archive, counter = Archive(source, id_header=id_header), Counter(meter, row)
    make_stage(piece.folder, lambda aside: _write(archive, Piece(aside), name, recipe, counter))


def _write(records: Archive, written: Piece, name: str, recipe: Recipe, counter: Counter) -> None:
    count = 0
    with (
        pq.ParquetWriter(written.audit, ledger.SCHEMA) as audit,
        pq.ParquetWriter(written.documents, DOCUMENT_SCHEMA) as documents,
    ):
        for rows, texts in _batches(records, recipe, name, counter):
            count += len(rows)
            audit.write_table(pa.Table.from_pylist(rows, ledger.SCHEMA))
            documents.write_table(pa.Table.from_pylist(texts, DOCUMENT_SCHEMA))
    summary = {
        "path": records.source.name,
        "bytes": records.bytes,
        "documents": count,
        "records": dict(sorted(records.records.items())),
        "sha256": records.sha256,
    }
    written.summary.write_text(json.dumps(summary))


Batch = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def _batches(records: Archive, recipe: Recipe, piece: str, counter: Counter) -> Iterator[Batch]:
    """Audit rows and passing texts, a thousand documents at a time or fewer long ones."""
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    characters = passed = documents = 0
    for number, document in enumerate(records):
        row, text = judge(document, recipe)
        rows.append(row)
        passed += text is not None
        documents += 1
        counter.count(document.offset, documents, passed)
        if text is not None:
            assert isinstance(document, Page)
            texts.append(
                {
                    "id": f"{piece}/{number}",
                    "document_id": document.id,
                    "timestamp": document.date or NO_DATE,
                    "text": text,
                }
            )
            characters += len(text)
        if len(rows) == ROWS_PER_WRITE or characters >= CHARACTERS_PER_WRITE:
            yield rows, texts
            rows, texts, characters = [], [], 0
    counter.count(records.bytes, documents, passed)
    yield rows, texts


def judge(document: Page | Reject, recipe: Recipe) -> tuple[dict[str, Any], str | None]:
    """A document's audit row, and its text where no stage of the recipe drops it."""
    row: dict[str, Any] = {
        "id": document.id,
        "url": document.url,
        "file": document.file,
        "offset": document.offset,
    }

    def drop(stage: str, reason: str, detail: str = "") -> tuple[dict[str, Any], None]:
        decision = {"stage": stage, "decision": ledger.DROPPED, "reason": reason}
        return {**row, **decision, "detail": detail or None}, None

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
    }
    if probability < recipe.language.threshold:
        return drop("language", "uncertain", f"{language} with probability {probability:.2f}")
    if recipe.language.allowed and language not in recipe.language.allowed:
        return drop("language", language)
    if recipe.word_blocklist and (listed := recipe.word_blocklist.judge(text)):
        return drop("quality", *listed)
    verdict = recipe.judge_quality(extracted, language)
    row["quality_score"] = verdict.score
    if verdict.reason is not None:
        return drop("quality", verdict.reason)
    row["words"] = verdict.document.words.words
    text = verdict.document.text
    if recipe.decontamination and (overlap := recipe.decontamination.judge(text)):
        return drop("decontamination", *overlap)
    if recipe.privacy:
        text, masked = recipe.privacy.mask(text)
        row |= {f"masked_{kind}": count for kind, count in masked.items()}
    return row, text
