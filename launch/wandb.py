"""`farspan wandb`: send a run to Weights & Biases, and the dashboards that show it."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Send runs and dashboards to Weights & Biases.")
dashboard_app = typer.Typer(
    no_args_is_help=True,
    help="Panels of training health, MoE, long context, performance, data and reliability.",
)
app.add_typer(dashboard_app, name="dashboard")

Entity = Annotated[str | None, typer.Option(help="The user or team (default: the account's own).")]
Project = Annotated[str, typer.Option(help="As wandb.project of the runs.")]


@app.command()
def sync(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")],
    wait: Annotated[
        float, typer.Option(min=0, help="Seconds that W&B may take to show what it was sent.")
    ] = 30.0,
) -> None:
    """Send what W&B does not have of a run, and verify that each row of metrics.jsonl arrived.

    Safe to repeat, and while the run trains offline. The key is that of WANDB_API_KEY or
    `wandb login`.

    Exit codes: 0 W&B has every row, 1 it has not, 2 a mistake in what was asked for.
    """
    from launch.wandb_sync import sync_run

    if not sync_run(run, wait):
        raise typer.Exit(1)


@dashboard_app.command()
def push(entity: Entity = None, project: Project = "farspan") -> None:
    """Make the dashboard a saved view of a W&B project, or bring it up to date."""
    from launch.wandb_dashboard import push_dashboard

    push_dashboard(entity, project)


@dashboard_app.command()
def export(
    entity: Entity = None,
    project: Project = "farspan",
    out: Annotated[Path | None, typer.Option(help="A file (default: print it).")] = None,
) -> None:
    """Write the dashboard as JSON, without a network or a key."""
    from launch.wandb_dashboard import export_dashboard

    export_dashboard(entity or "", project, out)
