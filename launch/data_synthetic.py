"""`farspan data synthetic`: shards of documents that ask for what stands far back in them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launch.progress import show_progress
from launch.stoppable import stoppable

console = Console()


def synthetic(
    task: Annotated[
        str,
        typer.Option(help="needle, multi_key, multi_value, variable_tracking or overwrite."),
    ],
    length: Annotated[int, typer.Option(help="Tokens of each document.")],
    documents: Annotated[int, typer.Option(help="How many.")],
    out: Annotated[
        Path, typer.Option(help="Folder to fill; documents of one vocabulary can be mixed.")
    ],
    vocab_size: Annotated[int, typer.Option(help="A quarter of it are keys.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    pairs: Annotated[int, typer.Option(help="Keys, or chains of variables.")] = 4,
    values: Annotated[
        int,
        typer.Option(
            help="Of each key in multi_value and overwrite; variables of a chain in "
            "variable_tracking."
        ),
    ] = 3,
    spread: Annotated[
        bool,
        typer.Option(
            "--spread/--at-end", help="Ask anywhere, to learn from all distances, or at the end."
        ),
    ] = False,
    gap: Annotated[
        int,
        typer.Option(
            help="Fewest tokens between a question and what it asks for; with those of a segment "
            "none is answered by its own."
        ),
    ] = 0,
) -> None:
    """Make token shards of a synthetic task, to train on from scratch.

    Only the answers are predicted. `farspan eval --suite long` asks the same
    of a model, from other seeds.
    """
    from data_pipeline.synthetic import Task
    from data_pipeline.synthetic.shards import make_synthetic

    chosen = Task(name=task, pairs=pairs, values=values, spread=spread, gap=gap)
    with stoppable(console), show_progress(console) as progress:
        made = make_synthetic(
            chosen,
            out,
            length=length,
            documents=documents,
            vocab_size=vocab_size,
            seed=seed,
            progress=progress,
        )
    manifest = made.manifest
    if not made.is_new:
        typer.echo(f"{out} is finished already: same options")
    typer.echo(
        f"{manifest.documents} documents, {manifest.tokens} tokens in {len(manifest.shards)} "
        f"shards: {out / 'manifest.json'}"
    )
