"""`farspan data tokenize`, `import` and `export`: shards from other formats, and to them."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from launch.progress import show_progress
from launch.stoppable import stoppable
from pretrain.errors import UserError

if TYPE_CHECKING:
    from data_pipeline.formats import Made

console = Console()

Out = Annotated[
    Path, typer.Option(help="Folder to fill; a killed command that is repeated continues there.")
]
TokenizerFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A Hugging Face tokenizer.json; this or --like.")
]
Like = Annotated[
    str | None,
    typer.Option(metavar="SHARDS", help="Take the tokenizer of this folder of shards, or its URL."),
]


class Format(StrEnum):
    """What shards are exported to."""

    megatron = "megatron"
    parquet = "parquet"
    jsonl = "jsonl"


def tokenize(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="Parquet or JSONL(.gz, .zst) files.")
    ],
    out: Out,
    tokenizer: TokenizerFile = None,
    like: Like = None,
    text_field: Annotated[str, typer.Option(help="Field or column of the text.")] = "text",
    id_field: Annotated[
        str, typer.Option(help="Of a string id; a document without is called FILE:ROW.")
    ] = "id",
) -> None:
    """Make token shards of clean texts, to train on beside a crawl's.

    Each row is a document. Shards that are trained on together have one
    tokenizer: --like takes that of the crawl's.
    """
    from data_pipeline.formats import tokenize_files, tokenizer_of

    chosen = tokenizer_of(tokenizer, like)
    with stoppable(console), show_progress(console) as progress:
        made = tokenize_files(
            files, chosen, out, text_field=text_field, id_field=id_field, progress=progress
        )
    _report(made, out)


def import_megatron(
    prefixes: Annotated[
        list[Path],
        typer.Argument(metavar="PREFIX...", help="Of PREFIX.bin and PREFIX.idx, or either file."),
    ],
    out: Out,
    tokenizer: TokenizerFile = None,
    like: Like = None,
) -> None:
    """Make token shards of Megatron's tokenized datasets (.bin, .idx).

    The tokenizer is the one that made the tokens. A document that lacks its
    end-of-document token gets it.
    """
    from data_pipeline.formats import import_megatron as run_import
    from data_pipeline.formats import tokenizer_of

    chosen = tokenizer_of(tokenizer, like)
    with stoppable(console), show_progress(console) as progress:
        made = run_import(prefixes, chosen, out, progress)
    _report(made, out)


def export(
    shards: Annotated[
        str, typer.Argument(metavar="SHARDS", help="A finished folder of shards, or its URL.")
    ],
    out: Annotated[
        Path,
        typer.Option(help="A new .parquet or .jsonl(.gz, .zst), or Megatron's prefix."),
    ],
    to: Annotated[Format, typer.Option(help="The format.")],
    append_eod: Annotated[
        bool | None,
        typer.Option(
            "--append-eod/--no-append-eod",
            help="Of megatron: keep each document's end-of-document token (default), or not.",
        ),
    ] = None,
) -> None:
    """Write token shards as Megatron's .bin and .idx, Parquet, or JSON Lines.

    JSON Lines have id and text, Parquet tokens as well; a text is the decoded
    tokens. WebDataset reads SHARDS/shards/*.tar as they are.
    """
    from data_pipeline.formats import export_jsonl, export_megatron, export_parquet

    if append_eod is not None and to is not Format.megatron:
        raise UserError(f"--append-eod belongs to --to megatron, not to {to.value}; leave it out")
    with show_progress(console) as progress:
        if to is Format.megatron:
            keep = append_eod is not False
            manifest = export_megatron(shards, out, append_eod=keep, progress=progress)
        elif to is Format.parquet:
            manifest = export_parquet(shards, out, progress)
        else:
            manifest = export_jsonl(shards, out, progress)
    typer.echo(f"wrote {manifest.documents} documents: {out}")


def _report(made: "Made", out: Path) -> None:
    manifest = made.manifest
    if not made.is_new:
        typer.echo(f"{out} is finished already: same inputs, same options")
    typer.echo(
        f"{manifest.documents} documents, {manifest.tokens} tokens in {len(manifest.shards)} "
        f"shards: {out / 'manifest.json'}"
    )
