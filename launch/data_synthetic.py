"""`farspan data synthetic`: shards of documents that ask for what stands far back in them."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launch.progress import show_progress
from launch.stoppable import stoppable
from pretrain.errors import UserError

console = Console()
ICL = "icl"


def synthetic(
    task: Annotated[
        str,
        typer.Option(
            help="needle, multi_key, multi_value, variable_tracking or overwrite; or copy, "
            "reversal, arithmetic, pattern or translation; or icl, for all five of these."
        ),
    ],
    length: Annotated[int, typer.Option(help="Tokens of each document.")],
    documents: Annotated[int, typer.Option(help="How many.")],
    out: Annotated[
        Path, typer.Option(help="Folder to fill; documents of one vocabulary can be mixed.")
    ],
    vocab_size: Annotated[int, typer.Option(help="A quarter of it are keys.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    pairs: Annotated[
        int | None, typer.Option(help="Keys, or chains of variables (default: 4).")
    ] = None,
    values: Annotated[
        int | None,
        typer.Option(
            help="Of each key in multi_value and overwrite; variables of a chain in "
            "variable_tracking (default: 3)."
        ),
    ] = None,
    spread: Annotated[
        bool | None,
        typer.Option(
            "--spread/--at-end",
            help="Ask anywhere, to learn from all distances, or at the end (default).",
        ),
    ] = None,
    gap: Annotated[
        int | None,
        typer.Option(
            help="Fewest tokens between a question and what it asks for; with those of a segment "
            "none is answered by its own (default: 0)."
        ),
    ] = None,
) -> None:
    """Make token shards of a synthetic task, to train on from scratch.

    Only the answers are predicted. `farspan eval --suite long` asks the same
    of a model, and `--suite icl` of one that was trained on icl.
    """
    from data_pipeline.synthetic import ICL_TASKS, Task
    from data_pipeline.synthetic.shards import make_examples, make_synthetic

    sizes = {"length": length, "documents": documents, "vocab_size": vocab_size, "seed": seed}
    of_task = {"pairs": pairs, "values": values, "spread": spread, "gap": gap}
    given: dict[str, Any] = {name: value for name, value in of_task.items() if value is not None}
    of_icl = tuple(name for name in ICL_TASKS if task in (ICL, name))
    if of_icl and given:
        raise UserError(f"--{next(iter(given))} does not belong to {task}; leave it out")
    with stoppable(console), show_progress(console) as progress:
        if of_icl:
            made = make_examples(of_icl, out, **sizes, progress=progress)
        else:
            made = make_synthetic(Task(name=task, **given), out, **sizes, progress=progress)
    manifest = made.manifest
    if not made.is_new:
        typer.echo(f"{out} is finished already: same options")
    typer.echo(
        f"{manifest.documents} documents, {manifest.tokens} tokens in {len(manifest.shards)} "
        f"shards: {out / 'manifest.json'}"
    )
