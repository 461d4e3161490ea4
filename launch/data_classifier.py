"""`farspan data train-classifier`: a quality classifier for the recipe gpt3."""

from pathlib import Path
from typing import Annotated

import typer

FILES = "Parquet or JSONL(.gz, .zst) files with `text`, or folders of them; may be repeated."


def train_classifier(
    positive: Annotated[list[Path], typer.Option(help=f"Curated texts. {FILES}")],
    negative: Annotated[list[Path], typer.Option(help="Texts of a crawl, in such files.")],
    out: Annotated[Path, typer.Option(help="Model file to write (safetensors).")],
    documents: Annotated[
        int, typer.Option(min=1, help="Use at most this many of each, drawn by a hash.")
    ] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing and of the order.")] = 1,
) -> None:
    """Learn to tell curated texts from a crawl's, for `farspan data run --recipe gpt3`.

    Take the crawl's texts from `farspan data extract`, before any filter. A text counts once.
    """
    from data_pipeline.quality.training import train_classifier as train

    training = train(positive, negative, documents, seed)
    training.model.save(out)
    curated, crawled = training.documents
    typer.echo(f"trained on nine tenths of {curated} curated and {crawled} crawled documents")
    typer.echo(f"on the others: {training.accuracy:.1%} told right, each kind weighing half")
    kept_curated, kept_crawled = training.kept
    typer.echo(
        f"by the rule of the recipe gpt3 {kept_curated:.0%} of the curated would be kept and "
        f"{kept_crawled:.0%} of the crawled"
    )
    typer.echo(f"wrote {out}; use it by: farspan data run ... --recipe gpt3 --classifier {out}")
