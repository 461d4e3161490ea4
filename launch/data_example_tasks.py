"""`farspan data example-tasks`: files of small tasks for lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated

import typer


def example_tasks(
    out: Annotated[Path, typer.Option(help="Folder to fill, as for farspan eval --tasks-dir.")],
    questions: Annotated[int, typer.Option(help="Of each task.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
) -> None:
    """Write small tasks for lm-evaluation-harness: one with choices, one of likelihood, one to
    generate. They need no network, and show what a task's files look like.

    `farspan eval RUN --suite lm-eval` asks them.
    """
    from data_pipeline.example_tasks import write_example_tasks

    names = write_example_tasks(out, seed=seed, questions=questions)
    typer.echo(f"{', '.join(names)}: {out}")
