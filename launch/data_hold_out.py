"""`farspan data hold-out`: documents to evaluate with, which are never trained on."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launch.progress import show_progress
from launch.stoppable import stoppable

console = Console()


def hold_out(
    shards: Annotated[
        str, typer.Argument(metavar="SHARDS", help="A finished folder of shards, or its URL.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to fill with those to train on, and OUT/held-out.")
    ],
    share: Annotated[float, typer.Option(help="Of the documents, held out.")] = 0.01,
) -> None:
    """Divide shards into documents to train on and documents to evaluate with.

    A hash of its tokens decides for each document. A run with eval.every
    takes the loss of what lies in data.shards/held-out.
    """
    from data_pipeline.hold_out import hold_out as divide

    with stoppable(console), show_progress(console) as progress:
        divided = divide(shards, out, share=share, progress=progress)
    if not divided.is_new:
        typer.echo(f"{out} is finished already: same shards, same share")
    for folder, manifest in ((out, divided.training), (out / "held-out", divided.held_out)):
        typer.echo(f"{manifest.documents} documents, {manifest.tokens} tokens: {folder}")
