"""`farspan launch`: start, watch, end and start again the runs of this machine and of Slurm.

Heavy imports stay inside the commands.
"""

from pathlib import Path
from typing import Annotated

import typer

from pretrain.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    help="Start, watch, end and resubmit runs, on this machine or on a Slurm cluster.",
)

Recipe = Annotated[str, typer.Argument(help="A shipped recipe or the path of a .yaml file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings, as in optim.lr=1e-3."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")]
RunDir = Annotated[Path | None, typer.Option(help="Where the run lives (default: runs/RECIPE).")]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(metavar="SETTING", help="Let this setting differ from the run's, as in optim.lr."),
]
MaxRestarts = Annotated[
    int, typer.Option(min=0, help="Restarts in a row after failures without progress; 0: none.")
]

Plain = Annotated[
    bool, typer.Option("--plain", help="A line for each row, no panel, on a terminal too.")
]


@app.command()
def local(
    recipe: Recipe,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Ranks on this machine.")] = 1,
    run_dir: RunDir = None,
    max_restarts: MaxRestarts = 3,
    allow_change: AllowChange = None,
    plain: Plain = False,
) -> None:
    """Train on this machine: the life of a Slurm job, without Slurm.

    It stays in the foreground and shows the log of rank 0, on a terminal above a panel. Markers,
    attempts, logs and restarts are those of a job: `status`, `logs`, `cancel` and `resubmit` work
    from another terminal, and the same command again goes on from the newest checkpoint.

    SIGTERM, SIGUSR2 and ctrl-C save and stop. When a rank fails, all are started again from the
    newest checkpoint, unless they would fail again: after a mistake, after MAX-RESTARTS restarts
    in a row without progress, or when three attempts in a row died of the same error at the same
    step.

    Exit codes: 0 done, 75 stopped on request with everything saved, 2 a mistake in what was asked
    for, 1 anything else.
    """
    from launch.train import prepare, train_locally

    run = prepare(recipe, overrides or [], nproc, run_dir, allow_change or [])
    raise typer.Exit(train_locally(run, nproc, max_restarts, plain))


@app.command()
def slurm(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="How many the job gets.")] = 1,
    profile: Annotated[
        str, typer.Option(help="The site: a shipped profile, or a .yaml file (docs/slurm.md).")
    ] = "generic",
    run_dir: RunDir = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="Limit of each job, as in 24:00:00 or 2-12 (default: the profile's, or the "
            "partition's). A run that takes longer goes on in the next one."
        ),
    ] = None,
    dependency: Annotated[
        str | None,
        typer.Option(
            help="A job that has to succeed first, as in 4711, or what sbatch takes, as in "
            "afterany:4711."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the job (default: that of the run directory).")
    ] = None,
    allow_change: AllowChange = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the checks, the command and the batch script; submit nothing."
        ),
    ] = False,
) -> None:
    """Submit a run to Slurm, and return.

    Before anything is submitted, partition, limits, layout, folders and data are checked. The job
    saves and requeues itself before its time limit, when it is preempted and after failures, which
    it then meets on other nodes, until the run is done; a run that would fail again is given up.
    RUN/slurm-JOB.log says how it went, RUN/attempts/NNNN what each rank said.

    The run directory has to be on a file system that all nodes see. The same command again goes on
    from the newest checkpoint.

    Exit codes: 0 submitted, 2 a mistake in what was asked for, 1 Slurm does not take it.
    """
    from launch.slurm.submit import Request, submit_run

    request = Request(
        recipe=recipe,
        overrides=overrides or [],
        nodes=nodes,
        profile=profile,
        run_dir=run_dir,
        name=name,
        time=time,
        dependency=dependency,
        allowed=allow_change or [],
    )
    submit_run(request, dry_run)


@app.command()
def status(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Run directories, and folders of data runs (default: those under ./runs, and of "
            "your Slurm jobs).",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it anew every 2 s, until all runs have ended.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Where runs are: state, attempt, step, tokens/s, last checkpoint, ETA, and what went wrong.

    Of `farspan data run`: the stage, how many of its parts are done, running, queued or failed,
    archives, documents, their rate, and until when the stage is done.

    Of one run also which nodes are excluded and why, and what its last attempts died of. A job that
    waits gets back the nodes whose time is over, which Slurm would not do by itself. It needs
    neither Slurm's accounting nor its JSON, and without Slurm it goes by the run directory alone.

    States: prepared (no attempt yet), queued, running, cancelling (it saves), ending, stopped (on
    request, everything is saved), cancelled, failed (not started again), lost (ended without a
    word, such as when the launcher was killed), done.
    """
    if watch and as_json:
        raise UserError("--watch is for people, --json for programs: give one of them")
    from launch.status import print_status

    print_status(runs or [], watch, as_json)


@app.command()
def logs(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="The rank.")] = 0,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="Of the run (default: the newest).")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Go on until the run has ended, over restarts and requeues."
        ),
    ] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="Only the last ones (default: all).")
    ] = None,
    job: Annotated[
        bool,
        typer.Option(
            "--job", help="What the batch jobs have printed: starts, requeues, and why they ended."
        ),
    ] = False,
) -> None:
    """Print the log of a rank, or follow it.

    Each attempt has logs of its own, RUN/attempts/NNNN/rank-N.log. With --follow the log of a newer
    attempt is shown as soon as there is one, and the command ends with the run.
    """
    if job and (attempt is not None or rank):
        raise UserError("--job has neither ranks nor attempts: leave out --rank and --attempt")
    from launch.logs import Logs, print_logs
    from pretrain.run_dir import RunDirectory

    print_logs(Logs(RunDirectory(run.resolve()), rank, attempt, job), lines, follow)


@app.command()
def cancel(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without saving.")] = False,
) -> None:
    """Let a run save and stop, and see to it that nothing of it is left or started again.

    A job that waits is taken out of the queue. A run that trains gets five minutes to save; what
    has not ended by then is killed. On this machine that goes for runs of `farspan train` too.
    """
    from launch.cancel import cancel
    from pretrain.run_dir import RunDirectory

    cancel(RunDirectory(run.resolve()), now)


@app.command()
def resubmit(run: Run, max_restarts: MaxRestarts = 3, plain: Plain = False) -> None:
    """Start a run again as it was started: after a failure, a cancel, or when it was stopped.

    A run of `farspan launch slurm` is submitted once more, with the same nodes, profile and limits;
    a run of this machine goes on here, in the foreground, on as many ranks as before. Failures
    count anew. A run that lives or is done is refused.
    """
    from launch.resubmit import resubmit
    from pretrain.run_dir import RunDirectory

    raise typer.Exit(resubmit(RunDirectory(run.resolve()), max_restarts, plain))


@app.command()
def doctor(
    profile: Annotated[
        str, typer.Option(help="The site: a shipped profile or the path of a .yaml file.")
    ] = "generic",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="How many to look at (default: 2, or the only one).")
    ] = None,
    directory: Annotated[
        Path, typer.Option("--dir", help="On the shared file system, where runs will lie.")
    ] = Path("runs"),
    wait: Annotated[
        float, typer.Option(min=0, help="Minutes in which the job must have started.")
    ] = 15,
) -> None:
    """Look at a Slurm cluster, on this machine and by a job of a minute, and say what to mend.

    Looked at are Slurm's settings (version, partition, time limits, requeueing, GPUs) and, on the
    nodes: names, ports, clocks, versions, disks, the shared folder and its locks, the signal that
    asks to save, GPUs, and the bandwidth of an all-reduce over all ranks.

    What was measured is kept where something is found, in a hidden folder of DIR.

    Exit codes: 0 nothing found, 1 something found or no answer from Slurm, 2 a mistake in what was
    asked for.
    """
    from rich.console import Console

    from launch.slurm.doctor.doctor import Asked, examine

    is_well = examine(Asked(profile, nodes, directory, 60 * wait), Console())
    raise typer.Exit(0 if is_well else 1)
