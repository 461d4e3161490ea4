"""`farspan data`: from web archives to token shards. Heavy imports stay inside the commands."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from launch.data_audit import audit
from launch.data_classifier import train_classifier
from launch.data_example_tasks import example_tasks
from launch.data_formats import export, import_megatron, tokenize
from launch.data_hold_out import hold_out
from launch.data_index import app as index_app
from launch.data_index import dedup_with_index
from launch.data_mixture import mixture
from launch.data_run import DataRun, report
from launch.data_synthetic import synthetic
from launch.progress import show_progress
from launch.stoppable import stoppable
from pretrain.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.parts import Part

app = typer.Typer(no_args_is_help=True, help="Make token shards from web archives.")
console = Console()
SLURM = "slurm"
UNDER_SLURM = "With --engine slurm"


class Mode(StrEnum):
    """How the main text of a page is found."""

    fast = "fast"
    accurate = "accurate"


class Exact(StrEnum):
    """What is removed wherever it was before."""

    document = "document"
    paragraph = "paragraph"
    line = "line"


class Keep(StrEnum):
    """The document that stays of a cluster of duplicates."""

    longest = "longest"
    newest = "newest"
    first = "first"


Archives = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="WARC or WET files, folders and patterns, here or in s3://; https:// URLs; crawls of "
        "Common Crawl, as in CC-MAIN-2024-10, or files of one: CC-MAIN-2024-10:0-9 for the first "
        "ten WARC files, CC-MAIN-2024-10/wet:0-9 for texts.",
    ),
]
CrawlUrl = Annotated[
    str, typer.Option(help="Where CC-MAIN-... is found: a URL or folder that holds crawl-data/.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="What deduplication holds at a time, as in 2GB (default: 0.4 kB of each document; "
        "with an index 2GB)."
    ),
]
Engine = Annotated[
    str, typer.Option(help="What reads texts: native (--workers), ray, or ray=ADDRESS.")
]
RunEngine = Annotated[
    str,
    typer.Option(help="What does it: native (--workers), ray, ray=ADDRESS; slurm submits jobs."),
]
IdHeader = Annotated[str, typer.Option(help="WARC header that holds a document's id.")]


@app.command()
def run(
    inputs: Archives,
    out: Annotated[Path, typer.Option(help="Folder to fill; a killed run continues there.")],
    recipe: Annotated[str, typer.Option(help="A shipped recipe or a .yaml file.")] = "c4-gopher",
    workers: Annotated[int, typer.Option(min=1, help="Processes, of each job under Slurm.")] = 1,
    engine: RunEngine = "native",
    memory: Memory = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only clean the I-th of N parts of the archives, all at a time if you like; the "
            "same command without --task does the rest.",
        ),
    ] = None,
    tasks: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=UNDER_SLURM, help="Jobs that clean, and that write shards."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=UNDER_SLURM, help="The site, by name or .yaml file (default: generic)."
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=UNDER_SLURM, help="Limit of a job, as in 12:00:00 (the profile's)."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=UNDER_SLURM,
            help="Print what is left and would be submitted.",
        ),
    ] = False,
    prepare_only: Annotated[
        bool,
        typer.Option(
            "--prepare-only",
            rich_help_panel=UNDER_SLURM,
            help="Leave it to you to submit the jobs.",
        ),
    ] = False,
    id_header: IdHeader = "WARC-Record-ID",
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.json (default: train one).")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Of a trained tokenizer.")] = 8192,
    mode: Annotated[Mode | None, typer.Option(help="Instead of the recipe's.")] = None,
    languages: Annotated[
        str | None, typer.Option(help="ISO 639-1 codes, as in en,de, instead of the recipe's.")
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="Of train-classifier, for the recipe gpt3.")
    ] = None,
    crawl_url: CrawlUrl = "https://data.commoncrawl.org",
) -> None:
    """Clean, deduplicate, tokenize and shard; audit what became of every document."""
    asked = DataRun(
        inputs=tuple(inputs),
        recipe=recipe,
        mode=mode.value if mode else None,
        languages=languages,
        classifier=None if classifier is None else str(classifier),
        tokenizer=None if tokenizer is None else str(tokenizer),
        vocab_size=vocab_size,
        id_header=id_header,
        crawl_url=crawl_url,
        memory=memory,
    )
    part = _parse_part(task, engine)
    if engine == SLURM:
        from launch.slurm.data import Request, submit_data_run

        request = Request(tasks, workers, profile, time, dry_run, prepare_only)
        submit_data_run(asked, out, request, console)
        return
    if engine.partition("=")[0] not in ("native", "ray"):
        raise UserError(f"--engine {engine}: must be native, ray, ray=ADDRESS or slurm")
    if not (tasks is profile is time is None) or dry_run or prepare_only:
        raise UserError(
            "--tasks, --profile, --time, --dry-run and --prepare-only belong to --engine slurm"
        )
    with stoppable(console), show_progress(console) as progress:
        if part is not None:
            archives = asked.parted(out).clean(part, workers, progress)
            _say(f"{out}: cleaned part {task}, {archives} archives")
            return
        result = asked.run(out, workers, engine, progress)
    report(result, out, console)


def _parse_part(task: str | None, engine: str) -> "Part | None":
    from data_pipeline.engine import NATIVE
    from data_pipeline.errors import DataError
    from data_pipeline.parts import Part

    if task is None:
        return None
    number, _, of = task.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise DataError(f"task={task} is not allowed: it is I/N, from 1/N to N/N, as in 3/8")
    if engine != NATIVE:
        raise DataError(f"task={task} with engine={engine}: a part is cleaned on one machine")
    return Part(int(number), int(of))


@app.command()
def extract(
    inputs: Archives,
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    mode: Annotated[Mode, typer.Option(help="Classified blocks, or trafilatura.")] = Mode.fast,
    id_header: IdHeader = "WARC-Record-ID",
    crawl_url: CrawlUrl = "https://data.commoncrawl.org",
) -> None:
    """Write {"id", "url", "text"} of every page."""
    from data_pipeline.extract import extract_archives

    with show_progress(console) as progress:
        outcomes = extract_archives(
            inputs,
            out,
            mode=mode.value,
            id_header=id_header,
            crawl_url=crawl_url,
            progress=progress,
        )
    for outcome, documents in outcomes.most_common():
        _say(f"{outcome}: {documents}")
    _say(f"wrote {out}")


@app.command()
def dedup(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="Parquet or JSONL(.gz, .zst) files.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for documents/ and clusters.parquet.")],
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Jaccard similarity of near-duplicates.")
    ] = 0.8,
    exact_only: Annotated[
        bool, typer.Option("--exact-only", help="Leave near-duplicates alone.")
    ] = False,
    bands: Annotated[
        int | None, typer.Option(min=1, help="Of a signature (default: 14, more below 0.79).")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Minima of a band (default: 8, fewer below 0.79).")
    ] = None,
    ngram: Annotated[int, typer.Option(min=1, help="Words of a shingle.")] = 5,
    exact: Annotated[
        Exact, typer.Option(help="Remove repeated paragraphs or lines from documents, too.")
    ] = Exact.document,
    keep: Annotated[
        Keep, typer.Option(help="Which of a cluster; newest by the column `timestamp`.")
    ] = Keep.longest,
    workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    index: Annotated[
        Path | None,
        typer.Option(help="Folder of all earlier dumps' documents; these are added to it."),
    ] = None,
    memory: Memory = None,
    engine: Engine = "native",
) -> None:
    """Remove exact and near-duplicates from files with `id` and `text`."""
    from data_pipeline.dedup import deduplicate
    from data_pipeline.dedup.index import parse_memory
    from data_pipeline.engine import open_cluster

    cluster = open_cluster(engine)
    if index is not None:
        dedup_with_index(
            inputs,
            out,
            index,
            exact=exact.value,
            memory=memory,
            workers=workers,
            engine=cluster,
            threshold=None if exact_only else threshold,
            bands=bands,
            rows=rows,
            ngram=ngram,
            keep=keep.value,
        )
        return
    report = deduplicate(
        inputs,
        out,
        threshold=None if exact_only else threshold,
        bands=bands,
        rows=rows,
        ngram=ngram,
        exact=exact.value,
        keep=keep.value,
        workers=workers,
        memory=None if memory is None else parse_memory(memory),
        engine=cluster,
    )
    _say(f"kept {report.kept} of {report.documents} documents: {out / 'documents'}")
    _say(
        f"dropped {report.exact_duplicates} exact and {report.near_duplicates} near duplicates "
        f"in {report.clusters} clusters: {out / 'clusters.parquet'}"
    )
    if exact is not Exact.document:
        _say(
            f"removed {report.removed_units} repeated {exact.value}s, and {report.emptied} "
            "documents that had nothing else"
        )


app.command()(audit)
app.command()(mixture)
app.add_typer(index_app, name="index")
app.command()(train_classifier)
app.command()(tokenize)
app.command("import")(import_megatron)
app.command()(export)
app.command()(synthetic)
app.command()(example_tasks)
app.command()(hold_out)


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
