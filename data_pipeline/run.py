"""From web archives to audited token shards, in one folder that a killed run continues.

DIR/plan.json        what was asked for: inputs, recipe, options
DIR/.lock            names the process at work, which holds it
DIR/work/            finished stages (`data_pipeline.stage`) of an unfinished run; removed later
DIR/audit/*.parquet  one file per archive, one row per document (`data_pipeline.ledger`)
DIR/shards/, DIR/tokenizer.json, DIR/manifest.json   see `data_pipeline.shards`
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import ledger
from data_pipeline.clean import Piece, clean_archive, get_ready
from data_pipeline.crawl import CRAWL_URL, Source, find_archives, identify
from data_pipeline.dedup import deduplicate
from data_pipeline.errors import file_errors
from data_pipeline.meter import Meter
from data_pipeline.recipe import Recipe
from data_pipeline.run_folder import exclusive, record_plan
from data_pipeline.shards import Manifest, load_manifest, write_shards
from data_pipeline.shards.manifest import GROWING
from data_pipeline.stage import is_made, make_stage
from data_pipeline.tokenize import load_tokenizer, require_vocab_size, train_tokenizer
from data_pipeline.workers import do_each

TOKENIZER = "tokenizer.json"
TICK_S = 0.5


class Progress(Protocol):
    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """
        Args:
            done: parts of the stage.
            total: all its parts.
            detail: how fast it is, in words.
        """


def _no_progress(stage: str, done: int, total: int, detail: str = "") -> None:
    pass


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        funnel: documents by stage and reason, as `ledger.funnel` counts them.
        damage: a line with file and offset for every record that could not be read.
        is_new: false where the folder held this run already.
    """

    manifest: Manifest
    funnel: list[dict[str, Any]]
    damage: list[str]
    is_new: bool


def run(
    inputs: Sequence[str],
    out: Path,
    recipe: Recipe,
    *,
    workers: int = 1,
    id_header: str = "WARC-Record-ID",
    tokenizer: Path | None = None,
    vocab_size: int = 8192,
    crawl_url: str = CRAWL_URL,
    progress: Progress = _no_progress,
) -> RunResult:
    """Clean, deduplicate, tokenize and shard the documents of web archives.

    The same inputs, in any order, and options give the same bytes under `out` for any number of
    workers, also when the run was killed in between and started again.

    Args:
        inputs: WARC and WET files: paths, folders, patterns, URLs and crawls, as `find_archives`
            resolves them.
        tokenizer: a Hugging Face tokenizer.json; without one a BPE of `vocab_size` is trained on
            the kept texts.
        crawl_url: where the crawls of Common Crawl are found.

    Raises:
        DataError: an input that does not exist or cannot be read, one that has changed since the
            run began, or a folder that cannot be written, is in use, or holds another run or other
            files.
    """
    with file_errors():
        # Sorted, so that neither the bytes nor the pieces of a killed run depend on their order.
        sources = sorted(find_archives(inputs, crawl_url), key=lambda source: source.name)
        if tokenizer is None:
            require_vocab_size(vocab_size)
        else:
            vocab_size = load_tokenizer(tokenizer).vocab_size
        with exclusive(out):
            # For a large crawl on this machine that takes a while: it is read once more.
            sources = identify(sources, lambda done, total: progress("inputs", done, total))
            plan = {
                "inputs": {source.name: source.identity for source in sources},
                "recipe": recipe.model_dump(mode="json", exclude={"description"}),
                "id_header": id_header,
                "tokenizer": None if tokenizer is None else _sha256(tokenizer),
                "vocab_size": vocab_size,
            }
            record_plan(out, plan)
            return _run(sources, out, recipe, workers, id_header, tokenizer, vocab_size, progress)


def _run(
    sources: Sequence[Source],
    out: Path,
    recipe: Recipe,
    workers: int,
    id_header: str,
    tokenizer: Path | None,
    vocab_size: int,
    progress: Progress,
) -> RunResult:
    work = out / "work"
    if (out / "manifest.json").exists():
        (out / GROWING).unlink(missing_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        return _result(load_manifest(out), out, is_new=False)
    pieces, documents = clean_and_deduplicate(sources, work, recipe, id_header, workers, progress)
    _write_audit(pieces, work / "dedup" / "clusters.parquet", out / "audit")
    if tokenizer is None:
        tokenizer = _train_tokenizer(documents, work / "tokenizer", vocab_size, progress)
    funnel = ledger.funnel(out / "audit")
    extra = {
        "recipe": recipe.model_dump(mode="json"),
        "inputs": [json.loads(piece.summary.read_text()) for piece in pieces],
        "funnel": funnel,
    }
    kept = sum(row["documents"] for row in funnel if row["reason"] == ledger.KEPT)
    texts = _with_progress(_texts(documents, "document_id"), "shards", kept, progress)
    manifest = write_shards(texts, tokenizer, out, extra=extra)
    shutil.rmtree(work)
    return _result(manifest, out, is_new=True)


def clean_and_deduplicate(
    sources: Sequence[Source],
    work: Path,
    recipe: Recipe,
    id_header: str,
    workers: int,
    progress: Progress = _no_progress,
) -> tuple[list[Piece], Path]:
    """The cleaned form of each archive, and the folder of the documents that are kept of all.

    What is finished in `work` already is not done again.
    """
    work.mkdir(parents=True, exist_ok=True)
    pieces = [Piece(work / "pieces" / f"{number:05d}") for number in range(len(sources))]
    _clean(sources, pieces, work, recipe, id_header, workers, progress)
    return pieces, _deduplicate(pieces, work, recipe, workers, progress)


def _result(manifest: Manifest, out: Path, is_new: bool) -> RunResult:
    damage = ledger.damage(out / "audit")
    return RunResult(manifest, manifest.extra["funnel"], damage, is_new)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _ticking(tick: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Call `tick` every now and then; what is yielded calls it at once."""
    ended, one_at_a_time = Event(), Lock()

    def safely() -> None:
        with one_at_a_time:
            tick()

    def keep_ticking() -> None:
        while not ended.wait(TICK_S):
            safely()

    thread = Thread(target=keep_ticking, daemon=True)
    thread.start()
    try:
        yield safely
    finally:
        ended.set()
        thread.join()


def _clean(
    sources: Sequence[Source],
    pieces: Sequence[Piece],
    work: Path,
    recipe: Recipe,
    id_header: str,
    workers: int,
    progress: Progress,
) -> None:
    """Clean the archives whose piece is not there yet, one process per archive at a time."""
    with ThreadPoolExecutor(workers) as pool:
        are_made = list(pool.map(is_made, [piece.folder for piece in pieces]))
    meter = Meter(work / "meter", [source.size for source in sources], are_made)
    tasks = [
        (source, piece, recipe, id_header, meter.path, row)
        for row, (source, piece) in enumerate(zip(sources, pieces, strict=True))
        if not are_made[row]
    ]
    if tasks:
        get_ready(recipe)
    done = len(pieces) - len(tasks)
    with _ticking(lambda: progress("clean", done, len(pieces), meter.speed())) as tick:
        tick()
        for _ in do_each(clean_archive, tasks, workers):
            done += 1
            tick()


def _deduplicate(
    pieces: Sequence[Piece], work: Path, recipe: Recipe, workers: int, progress: Progress
) -> Path:
    """Deduplicate over all pieces; return the folder of the kept documents."""
    finished = work / "dedup"
    progress("dedup", 0, 1)
    if not is_made(finished):
        texts, settings = [piece.documents for piece in pieces], recipe.dedup.model_dump()
        make_stage(finished, lambda out: deduplicate(texts, out, **settings, workers=workers))
    progress("dedup", 1, 1)
    return finished / "documents"


def _write_audit(pieces: Sequence[Piece], clusters_file: Path, out: Path) -> None:
    """Write one audit file per piece, with the outcome of deduplication in its rows."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    clusters = _with_document_ids(pq.read_table(clusters_file), pieces)
    first = 0
    for piece in pieces:
        audit = pq.read_table(piece.audit)
        passed = audit["stage"].null_count
        settled = ledger.settle(audit, clusters.slice(first, passed))
        pq.write_table(settled, out / f"{piece.folder.name}.parquet")
        first += passed


def _with_document_ids(clusters: pa.Table, pieces: Sequence[Piece]) -> pa.Table:
    """Replace the ids that are unique in this run by the documents' own."""
    names = pa.concat_tables(
        pq.read_table(piece.documents, columns=["id", "document_id"]) for piece in pieces
    )
    ids = names["id"].cast(clusters["id"].type)
    assert clusters["id"].equals(ids), "deduplicate gives a row per document in input order"
    rows = pc.index_in(clusters["twin"], ids)
    twins = names["document_id"].take(rows)
    return clusters.set_column(clusters.schema.get_field_index("twin"), "twin", twins)


def _train_tokenizer(documents: Path, stage: Path, vocab_size: int, progress: Progress) -> Path:
    progress("tokenizer", 0, 1)
    if not is_made(stage):
        texts = (text for _, text in _texts(documents, "id"))
        make_stage(stage, lambda out: train_tokenizer(texts, vocab_size, out / TOKENIZER))
    progress("tokenizer", 1, 1)
    return stage / TOKENIZER


def _texts(documents: Path, id_column: str) -> Iterator[tuple[str, str]]:
    for path in sorted(documents.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(256, columns=[id_column, "text"]):
            ids, texts = (batch[name].to_pylist() for name in (id_column, "text"))
            yield from zip(ids, texts, strict=True)


def _with_progress(
    items: Iterator[tuple[str, str]], stage: str, total: int, progress: Progress
) -> Iterator[tuple[str, str]]:
    progress(stage, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        progress(stage, done, total)
