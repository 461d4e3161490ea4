"""The commands of a sandbox."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from slurm.sandbox.cluster import Cluster
from slurm.sandbox.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="A real Slurm cluster on this machine, without systemd, that others do not reach. "
    "All of it lies in one folder. After `start`, `source DIR/env.sh` and use sbatch, srun and "
    "squeue as anywhere; jobs of the partition main give way to those of urgent, and those of "
    "preempt to both.",
)
DEFAULTS = Settings()

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="What holds the cluster.")]
Node = Annotated[int, typer.Argument(metavar="I", help="The number of the node, from 1.")]


@app.command()
def start(
    folder: Dir,
    nodes: Annotated[int, typer.Option(min=1)] = DEFAULTS.nodes,
    cpus: Annotated[int, typer.Option(min=1, help="Of each node, real or not.")] = DEFAULTS.cpus,
    gpus: Annotated[int, typer.Option(min=0, help="Of each node, none real.")] = DEFAULTS.gpus,
    hostnames: Annotated[
        bool, typer.Option("--hostnames", help="The host name of node 3 is node3; needs root.")
    ] = False,
    netns: Annotated[
        bool,
        typer.Option("--netns", help="Each node has a network, which `cut` unplugs; needs root."),
    ] = False,
    dbd: Annotated[
        bool, typer.Option("--dbd", help="With accounting, for sacct; needs MariaDB and slurmdbd.")
    ] = False,
    conf: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A line of slurm.conf.")
    ] = None,
) -> None:
    """Start a cluster and wait until its nodes are idle: about two seconds."""
    cluster = Cluster(folder)
    cluster.start(Settings(nodes, cpus, gpus, hostnames, netns, dbd, conf or []))
    print(f"source {cluster.folder}/env.sh")


@app.command()
def stop(folder: Dir) -> None:
    """Kill every process of it and of its jobs; the folder with the logs stays."""
    Cluster(folder).stop()


@app.command()
def status(folder: Dir) -> None:
    """Its processes, nodes and jobs."""
    print(Cluster(folder).status(), end="")


@app.command()
def kill_node(folder: Dir, node: Node) -> None:
    """A node crashes: its tasks and its slurmd die at once."""
    Cluster(folder).kill_node(node)


@app.command()
def start_node(folder: Dir, node: Node) -> None:
    """A node comes back."""
    Cluster(folder).start_node(node)


@app.command()
def cut(folder: Dir, node: Node) -> None:
    """Unplug the network of a node (--netns): what runs there runs on and reaches nobody."""
    Cluster(folder).cut(node)


@app.command()
def join(folder: Dir, node: Node) -> None:
    """Plug the network of a node in again."""
    Cluster(folder).join(node)


@app.command("exec", context_settings={"ignore_unknown_options": True})
def execute(
    folder: Dir,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...")],
    node: Annotated[int, typer.Option(min=0, help="Run it on this node; 0: the login node.")] = 0,
) -> None:
    """Run a command where it reaches the cluster: with --netns that is not everywhere."""
    cluster = Cluster(folder)
    done = subprocess.run(
        cluster.command(*command, node=node), env=cluster.environment(), check=False
    )
    raise typer.Exit(done.returncode)


def main() -> None:
    """Run a command; a mistake in what was asked for ends it with exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
