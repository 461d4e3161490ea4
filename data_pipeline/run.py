"""From web archives to audited token shards, in one folder that a killed run continues.

DIR/plan.json        what was asked for: inputs, recipe, options
DIR/.lock            names the process at work, which holds it
DIR/work/            finished stages (`data_pipeline.stage`) of an unfinished run; removed later
DIR/audit/*.parquet  one file per archive, one row per document (`data_pipeline.ledger`)
DIR/funnel.json      what each step got and dropped, with examples (`data_pipeline.funnel`)
DIR/metrics.jsonl    how long it took, and how fast it was (`data_pipeline.rates`)
DIR/shards/, DIR/tokenizer.json, DIR/manifest.json   see `data_pipeline.shards`
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import ledger
from data_pipeline.clean import Piece, clean_archive, get_ready, is_cleaned, own_ids
from data_pipeline.crawl import CRAWL_URL, Source, find_archives, identify
from data_pipeline.dedup import check_memory, deduplicate
from data_pipeline.dedup.batches import read_rows
from data_pipeline.dedup.outputs import CLUSTERS
from data_pipeline.engine import NATIVE, Engine, Native, open_cluster, open_engine
from data_pipeline.errors import DataError, file_errors
from data_pipeline.examples import Examples
from data_pipeline.funnel import Step, read_funnel, save_funnel, steps_of
from data_pipeline.kept import kept_files, read_sizes, read_texts
from data_pipeline.meter import Meter
from data_pipeline.rates import (
    RATES,
    Row,
    read_totals,
    remove_metrics,
    save_metrics,
    timed,
)
from data_pipeline.recipe import Recipe
from data_pipeline.run_folder import exclusive, record_plan
from data_pipeline.shards import Manifest, load_manifest
from data_pipeline.shards.manifest import GROWING
from data_pipeline.shards.planned import (
    Plan,
    bytes_of_tokens,
    load_plans,
    plan_shards,
    save_plans,
    write_planned_shards,
)
from data_pipeline.shards.writer import TOKENS_PER_SHARD
from data_pipeline.stage import is_made, make_stage
from data_pipeline.ticking import ticking
from data_pipeline.tokenize import load_tokenizer, require_vocab_size, train_tokenizer

TOKENIZER = "tokenizer.json"
PLANS = "plans.json"
DOCUMENTS = "documents"
TICK_S = 0.5


class Progress(Protocol):
    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """
        Args:
            done: parts of the stage.
            total: all its parts.
            detail: how fast it is, in words.
        """


def no_progress(stage: str, done: int, total: int, detail: str = "") -> None:
    pass


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        funnel: documents by stage and reason, as `ledger.funnel` counts them.
        rates: totals of each stage, see `data_pipeline.rates`.
        damage: a line with file and offset for every record that could not be read.
        is_new: false where the folder held this run already.
    """

    manifest: Manifest
    funnel: list[dict[str, Any]]
    rates: list[Row]
    damage: list[str]
    is_new: bool


@dataclass(frozen=True)
class Resources:
    """What a run may take; what it makes does not depend on it.

    Attributes:
        workers: processes that clean, and threads.
        engine: what cleans and signs, as `open_engine` names it.
        memory: bytes that deduplication holds at a time; None: 0.4 kB of each document.
    """

    workers: int = 1
    engine: str = NATIVE
    memory: int | None = None


def run(
    inputs: Sequence[str],
    out: Path,
    recipe: Recipe,
    *,
    workers: int = 1,
    engine: str = NATIVE,
    memory: int | None = None,
    id_header: str = "WARC-Record-ID",
    tokenizer: Path | None = None,
    vocab_size: int = 8192,
    crawl_url: str = CRAWL_URL,
    progress: Progress = no_progress,
) -> RunResult:
    """Clean, deduplicate, tokenize and shard the documents of web archives.

    The same inputs, in any order, and options give the same bytes under `out` for any number of
    workers, any engine and memory, also when the run was killed in between and started again; but
    for metrics.jsonl, which tells the times.

    Args:
        inputs: WARC and WET files: paths, folders, patterns, URLs and crawls, as `find_archives`
            resolves them.
        engine: what cleans the archives and signs their documents, see `open_engine`.
        tokenizer: a Hugging Face tokenizer.json; without one a BPE of `vocab_size` is trained on
            the kept texts.
        crawl_url: where the crawls of Common Crawl are found.

    Raises:
        DataError: an input that does not exist or cannot be read, one that has changed since the
            run began, or a folder that cannot be written, is in use, or holds another run or other
            files.
    """
    with file_errors():
        check_memory(memory, recipe.dedup.exact)
        sources, vocab_size = asked_for(inputs, crawl_url, tokenizer, vocab_size)
        with exclusive(out):
            # For a large crawl on this machine that takes a while: it is read once more.
            sources = identify(sources, lambda done, total: progress("inputs", done, total))
            identities = {source.name: source.identity for source in sources}
            record_plan(out, plan_of(identities, recipe, id_header, tokenizer, vocab_size))
            for number, source in enumerate(sources):
                refuse_changed(source, identity_file(out / "work", number))
            resources = Resources(workers, engine, memory)
            return _run(sources, out, recipe, id_header, tokenizer, vocab_size, resources, progress)


def asked_for(
    inputs: Sequence[str], crawl_url: str, tokenizer: Path | None, vocab_size: int
) -> tuple[list[Source], int]:
    """The archives, and the size of the vocabulary."""
    # Sorted, so that neither the bytes nor the pieces of a killed run depend on their order.
    sources = sorted(find_archives(inputs, crawl_url), key=lambda source: source.name)
    if tokenizer is not None:
        return sources, load_tokenizer(tokenizer).vocab_size
    require_vocab_size(vocab_size)
    return sources, vocab_size


def plan_of(
    identities: dict[str, Any],
    recipe: Recipe,
    id_header: str,
    tokenizer: Path | None,
    vocab_size: int,
) -> dict[str, Any]:
    return {
        "inputs": identities,
        "recipe": recipe.model_dump(mode="json", exclude={"description"}),
        "id_header": id_header,
        "tokenizer": None if tokenizer is None else _sha256(tokenizer),
        "vocab_size": vocab_size,
    }


def piece_of(work: Path, number: int) -> Piece:
    return Piece(work / "pieces" / f"{number:05d}")


def identity_file(work: Path, number: int) -> Path:
    """Where a part of a run says which content of an archive it cleans."""
    return work / "identities" / f"{number:05d}.json"


def refuse_changed(source: Source, path: Path) -> None:
    if path.exists() and json.loads(path.read_text()) != source.identity:
        raise DataError(
            f"{source.name}: has changed since a part of this run cleaned it; restore the file or "
            "choose another --out"
        )


def _run(
    sources: Sequence[Source],
    out: Path,
    recipe: Recipe,
    id_header: str,
    tokenizer: Path | None,
    vocab_size: int,
    resources: Resources,
    progress: Progress,
) -> RunResult:
    if (out / "manifest.json").exists():
        return finished(out)
    work = out / "work"
    pieces, documents = clean_and_deduplicate(sources, work, recipe, id_header, resources, progress)
    tokenizer = tokenizer or train_tokenizer_on(documents, work, vocab_size, progress)
    return write_out(pieces, tokenizer, out, recipe, resources, progress)


def finished(out: Path) -> RunResult:
    """The run that a folder holds already."""
    (out / GROWING).unlink(missing_ok=True)
    manifest = load_manifest(out)
    _end(out, manifest)
    return _result(manifest, out, is_new=False)


def write_out(
    pieces: Sequence[Piece],
    tokenizer: Path,
    out: Path,
    recipe: Recipe,
    resources: Resources,
    progress: Progress,
) -> RunResult:
    """Write audit and shards of what is deduplicated, and end the run."""
    work, workers = out / "work", resources.workers
    remove_metrics(out)
    with timed(work / RATES, "audit", workers=1):
        examples = _write_audit(pieces, work / "dedup" / CLUSTERS, out / "audit")
        counts = ledger.tally(out / "audit")
        inputs = [json.loads(piece.summary.read_text()) for piece in pieces]
        archive_bytes = sum(archive["bytes"] for archive in inputs)
        save_funnel(steps_of(counts, archive_bytes, examples), out)
    extra = {
        "recipe": recipe.model_dump(mode="json"),
        "inputs": inputs,
        "funnel": ledger.funnel(counts),
    }
    with timed(work / RATES, "shards", workers=workers) as attempt:
        plans = planned_shards(work / "dedup" / DOCUMENTS, tokenizer, work)

        def show(done: int) -> None:
            progress("shards", done, len(plans))
            attempt.count(items=len(plans), share=done / max(1, len(plans)))

        manifest = write_planned_shards(
            plans,
            read_texts,
            tokenizer,
            out,
            shards_of(work),
            open_engine(resources.engine, workers),
            extra=extra,
            progress=show,
        )
    _end(out, manifest)
    return _result(manifest, out, is_new=True)


def _end(out: Path, manifest: Manifest) -> None:
    """Write down how long the finished run took, and remove what it is made of."""
    work = out / "work"
    if (work / RATES).is_dir() and not read_totals(out):
        save_metrics(out, _volumes(out, manifest))
    shutil.rmtree(work, ignore_errors=True)


def _volumes(out: Path, manifest: Manifest) -> dict[str, Mapping[str, float]]:
    """What went through each stage, by the funnel, which counts each document once."""
    steps = {step["step"]: step for step in read_funnel(out)}

    def between(first: Step, last: Step) -> dict[str, float]:
        return {
            "documents": first["documents_in"],
            "bytes_in": first["bytes_in"],
            "bytes_out": last["bytes_in"],
        }

    crawl, dedup, shards = (steps[name] for name in ("crawl", "exact duplicates", "shards"))
    written = sum(shard.bytes for shard in manifest.shards)
    return {
        "clean": between(crawl, dedup),
        "dedup": between(dedup, shards),
        "shards": between(shards, shards) | {"bytes_out": written},
    }


def clean_and_deduplicate(
    sources: Sequence[Source],
    work: Path,
    recipe: Recipe,
    id_header: str,
    resources: Resources,
    progress: Progress = no_progress,
) -> tuple[list[Piece], Path]:
    """The cleaned form of each archive, and the folder of the documents that are kept of all.

    What is finished in `work` already is not done again.
    """
    work.mkdir(parents=True, exist_ok=True)
    pieces = [piece_of(work, number) for number in range(len(sources))]
    cleaners = open_engine(resources.engine, resources.workers)
    clean(sources, pieces, work / "meter", recipe, id_header, cleaners, progress)
    return pieces, deduplicate_pieces(pieces, work, recipe, resources, progress)


def _result(manifest: Manifest, out: Path, is_new: bool) -> RunResult:
    damage = ledger.damage(out / "audit")
    return RunResult(manifest, manifest.extra["funnel"], read_totals(out), damage, is_new)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clean(
    sources: Sequence[Source],
    pieces: Sequence[Piece],
    meter_file: Path,
    recipe: Recipe,
    id_header: str,
    engine: Engine,
    progress: Progress,
    part: str = "1/1",
) -> None:
    """Clean the archives whose piece is not there yet, one process per archive at a time.

    Args:
        part: which one of how many parts of a run these archives are.
    """
    if not sources:  # a part of more than there are archives
        return
    with ThreadPoolExecutor() as pool:
        are_made = list(pool.map(is_cleaned, pieces))
    meter = Meter(meter_file, [source.size for source in sources], are_made)
    tasks = [
        (source, piece, recipe, id_header, meter.path, row)
        for row, (source, piece) in enumerate(zip(sources, pieces, strict=True))
        if not are_made[row]
    ]
    done = len(pieces) - len(tasks)
    # Counters that other machines map into their memory need not be what they have written.
    speed = meter.speed if isinstance(engine, Native) else str
    with ExitStack() as stack:
        if tasks:
            rates, workers = meter_file.parent / RATES, engine.workers

            def measure() -> dict[str, float]:
                return meter.counts() | {"items": len(tasks)}

            stack.enter_context(timed(rates, "clean", workers=workers, part=part, measure=measure))
        tick = stack.enter_context(
            ticking(lambda: progress("clean", done, len(pieces), speed()), TICK_S)
        )
        tick()
        ready = partial(get_ready, recipe)
        for _ in engine.do_each(clean_archive, tasks, meter_file.parent, ready):
            done += 1
            tick()


def deduplicate_pieces(
    pieces: Sequence[Piece], work: Path, recipe: Recipe, resources: Resources, progress: Progress
) -> Path:
    """Deduplicate over all pieces; return the folder of the kept documents."""
    finished = work / "dedup"
    progress("dedup", 0, 1)
    if not is_made(finished):
        settings = recipe.dedup.model_dump() | {
            "workers": resources.workers,
            "memory": resources.memory,
            "engine": open_cluster(resources.engine),
        }
        texts = [piece.documents for piece in pieces]
        signed = [piece.signed for piece in pieces]
        with timed(work / RATES, "dedup", workers=resources.workers) as attempt:
            make_stage(finished, lambda out: deduplicate(texts, out, signed=signed, **settings))
            attempt.count(documents=pq.read_metadata(finished / CLUSTERS).num_rows)
    progress("dedup", 1, 1)
    return finished / DOCUMENTS


def _write_audit(pieces: Sequence[Piece], clusters_file: Path, out: Path) -> Examples:
    """Write one audit file per piece, with the outcome of deduplication in its rows.

    Returns:
        Examples of each outcome.
    """
    examples = Examples()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with pq.ParquetFile(clusters_file) as file:
        clusters = _Rows(file)
        for piece in pieces:
            audit = pq.read_table(piece.audit)
            passed = clusters.take(audit["stage"].null_count)
            twin = passed.schema.get_field_index("twin")
            passed = passed.set_column(twin, "twin", own_ids(passed["twin"]))
            settled = ledger.settle(audit, passed)
            pq.write_table(settled, out / f"{piece.folder.name}.parquet")
            examples.add_settled(piece.examples, settled)
    return examples


class _Rows:
    """The rows of a file, one after another; few are in memory at a time."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._batches = read_rows(file)
        self._left = file.schema_arrow.empty_table()

    def take(self, rows: int) -> pa.Table:
        """The next ones, of which there are so many."""
        while len(self._left) < rows:
            self._left = pa.concat_tables([self._left, pa.table(next(self._batches))])
        taken = self._left.slice(0, rows)
        self._left = self._left.slice(rows)
        return taken


def train_tokenizer_on(documents: Path, work: Path, vocab_size: int, progress: Progress) -> Path:
    """The tokenizer that is trained on the kept documents."""
    stage = work / "tokenizer"
    progress("tokenizer", 0, 1)
    if not is_made(stage):
        texts = _texts(kept_files(documents))
        with timed(work / RATES, "tokenizer", workers=1):
            make_stage(stage, lambda out: train_tokenizer(texts, vocab_size, out / TOKENIZER))
    progress("tokenizer", 1, 1)
    return stage / TOKENIZER


def _texts(files: Sequence[Path]) -> Iterator[str]:
    return (text for file in files for _, text in read_texts(file))


def planned_shards(documents: Path, tokenizer: Path, work: Path) -> list[Plan]:
    """Which of the kept documents each shard gets; kept in a file, so that others know it, too."""
    stage = plans_of(work).parent
    if not is_made(stage):
        files = kept_files(documents)
        size = bytes_of_tokens(TOKENS_PER_SHARD, _texts(files), tokenizer)
        plans = plan_shards(files, read_sizes, size)
        make_stage(stage, lambda out: save_plans(plans, out / PLANS))
    return load_plans(stage / PLANS, documents)


def plans_of(work: Path) -> Path:
    """Where they are kept."""
    return work / "plans" / PLANS


def shards_of(work: Path) -> Path:
    """The folder with a stage for each shard that is written."""
    return work / "shards"
