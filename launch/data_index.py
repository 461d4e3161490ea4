"""`farspan data index`: documents in an index, removed or listed. Heavy imports stay inside."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="List or remove documents of a deduplication index.")
console = Console()

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Of `farspan data dedup --index`.")]


@app.command()
def remove(
    folder: Folder,
    ids: Annotated[Path, typer.Option(help="A text file, an id a line.")],
    out: Annotated[
        Path, typer.Option(help="Parquet file of the others that are kept now, or not any more.")
    ],
    memory: Annotated[str, typer.Option(help="As in 500MB or 2GB.")] = "2GB",
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


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
