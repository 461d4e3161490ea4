"""`farspan data index`: documents in an index, removed or listed. Heavy imports stay inside."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from data_pipeline.engine import Engine

app = typer.Typer(no_args_is_help=True, help="List or remove documents of a deduplication index.")
console = Console()
MEMORY = "2GB"

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Of `farspan data dedup --index`.")]


@app.command()
def remove(
    folder: Folder,
    ids: Annotated[Path, typer.Option(help="A text file, an id a line.")],
    out: Annotated[
        Path, typer.Option(help="Parquet file of the others that are kept now, or not any more.")
    ],
    memory: Annotated[str, typer.Option(help="What is held at a time.")] = MEMORY,
) -> None:
    """Remove documents, as if they had never been added."""
    from data_pipeline.dedup.index import parse_memory, remove_documents
    from data_pipeline.errors import file_errors

    with file_errors():
        names = [line for line in ids.read_text().splitlines() if line]
        report = remove_documents(folder, names, out, memory=parse_memory(memory))
    _say(f"removed {report.removed} documents from {folder}")
    _say(f"{report.changed} others are kept now, or not any more: {out}")


@app.command()
def clusters(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="Parquet file to write, a row for each document.")],
) -> None:
    """Write what has become of each document of all dumps."""
    from data_pipeline.dedup.index import export_clusters
    from data_pipeline.errors import file_errors

    with file_errors():
        documents = export_clusters(folder, out)
    _say(f"{documents} documents: {out}")


def dedup_with_index(
    inputs: list[Path],
    out: Path,
    folder: Path,
    *,
    exact: str,
    memory: str | None,
    workers: int,
    engine: "Engine | None",
    **settings: Any,
) -> None:
    """`farspan data dedup --index`."""
    from data_pipeline.dedup.index import checked_settings, deduplicate_with_index, parse_memory
    from data_pipeline.errors import DataError

    if exact != "document":
        raise DataError(
            f"exact={exact} is not allowed with --index, which knows whole texts alone: "
            "deduplicate what is kept once more without it"
        )
    report = deduplicate_with_index(
        inputs,
        out,
        folder,
        checked_settings(**settings),
        memory=parse_memory(memory or MEMORY),
        workers=workers,
        engine=engine,
    )
    if not report.is_new:
        _say(f"{folder} has these documents already, as dump {report.dump}; nothing was added")
    _say(f"kept {report.kept} of {report.documents} documents: {out / 'documents'}")
    _say(
        f"dropped {report.exact_duplicates} exact and {report.near_duplicates} near duplicates "
        f"of these or of earlier dumps' documents: {out / 'clusters.parquet'}"
    )
    _say(
        f"{report.superseded} documents of earlier dumps are not kept any more: "
        f"{out / 'superseded.parquet'}"
    )


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
