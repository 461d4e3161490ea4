"""`farspan data mixture`: what a run's tokens will consist of, as in table 2.2 of GPT-3's paper."""

from itertools import pairwise
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def mixture(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As of `farspan train`.")
    ] = None,
) -> None:
    """Show how much of each source a run would train on, and how often it would pass over it."""
    from launch.sample import with_sample
    from pretrain.config import load_config, phases_of
    from pretrain.curriculum import step_sizes, steps_within, tokens_until
    from pretrain.data import curriculum_of, stream_of

    config = with_sample(load_config(recipe, overrides or []))
    phases, steps = phases_of(config), config.train.steps
    stream = stream_of(config)
    wanted = tokens_until(phases, steps)
    total, starts = stream.outlook(wanted), [0, *(phase.tokens for phase in curriculum_of(config))]
    starts = [first for first in starts if first < wanted]
    found = sum(use.tokens for use in total)

    console = Console(highlight=False, soft_wrap=True, markup=False)
    sizes = step_sizes(phases, steps)
    console.print(f"{recipe}: {steps:,} steps of {sizes} tokens: {wanted:,}\n")
    table = Table(box=None, pad_edge=False)
    table.add_column("source", no_wrap=True)
    for name in ("tokens", "trained on", "epochs", *(f"share from {n:,}" for n in starts)):
        table.add_column(name, justify="right", no_wrap=True)
    bounds = [*starts, wanted]
    before_and_after = [[use.tokens for use in stream.outlook(bound)] for bound in bounds]
    for number, use in enumerate(total):
        shares = []
        for before, after in pairwise(before_and_after):
            delivered = max(1, sum(after) - sum(before))
            shares.append(f"{(after[number] - before[number]) / delivered:.1%}")
        table.add_row(use.name, f"{use.size:,}", f"{use.tokens:,}", f"{use.epochs:.2f}", *shares)
    console.print(table)
    if found < tokens_until(phases, steps - 1):
        console.print(
            f"\nused up after {found:,} tokens, {steps_within(phases, found):,} steps: lower "
            "train.steps, or raise epochs or max_epochs"
        )
