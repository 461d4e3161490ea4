"""`farspan launch slurm`: check everything that can be checked, and submit a run as a job."""

import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from launch.run_state import read_state
from launch.slurm.checks import Checks, check_job, partition_of
from launch.slurm.client import Slurm, SlurmError
from launch.slurm.excludes import avoidable, excluded_now, nodes_of_site
from launch.slurm.job import Job, read_job, write_job
from launch.slurm.options import sbatch_options
from launch.slurm.profile import load_profile
from pretrain.config import Config, load_config
from pretrain.data_config import SAMPLE_SHARDS
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
DEFAULT_PROFILE = "generic"
ONE_DEPENDENCY = r"(?:singleton|after[a-z]*:[\d_+:]+)"


@dataclass(frozen=True)
class Request:
    """What `farspan launch slurm` was asked for.

    Attributes:
        run_dir: None: what the recipe says, or runs/RECIPE.
        name: of the job; None: that of the run directory.
        time: the limit of each job; None: the profile's.
        dependency: a job that has to succeed first, or a dependency as sbatch takes it.
        allowed: settings that may differ from those of the run that is there.
    """

    recipe: str
    overrides: Sequence[str] = ()
    nodes: int = 1
    profile: str = DEFAULT_PROFILE
    run_dir: Path | None = None
    name: str | None = None
    time: str | None = None
    dependency: str | None = None
    allowed: Sequence[str] = ()

    def directory(self, config: Config) -> Path:
        chosen = self.run_dir or Path(config.run.dir or Path("runs") / Path(self.recipe).stem)
        return chosen.resolve()


def submit_run(request: Request, dry_run: bool = False) -> None:
    """Submit a run, or say what would be submitted.

    Raises:
        UserError: something about it is wrong; nothing has been submitted then.
        SlurmError: Slurm does not take it, or does not answer.
    """
    slurm, profile = Slurm(), load_profile(request.profile)
    config = load_config(request.recipe, request.overrides)
    run = RunDirectory(request.directory(config))
    profile, checks = check_job(
        slurm,
        profile,
        config,
        name=request.name or name_of(run),
        nodes=request.nodes,
        time=request.time,
        directory=run.root,
    )
    assert isinstance(profile.ranks_per_node, int)
    job = Job(
        recipe=request.recipe,
        overrides=tuple(request.overrides),
        name=request.name or name_of(run),
        nodes=request.nodes,
        ranks_per_node=profile.ranks_per_node,
        time=request.time,
        dependency=dependency_of(request.dependency),
        profile_name=request.profile,
        profile=profile,
        python=sys.executable,
    )
    if problem := _problem_of_state(run, slurm):
        checks.problems.append(problem)
    if problem := _problem_of_data(config):
        checks.problems.append(problem)
    if not checks.problems:
        _ask_slurm(run, job, checks, slurm)
    if dry_run:
        _print_plan(run, job, checks)
    if checks.problems:
        problems = "\n".join(checks.problems)
        raise UserError(f"nothing was submitted:\n{problems}" if dry_run else problems)
    if dry_run:
        return

    from launch.train import prepare

    prepare(request.recipe, request.overrides, job.ranks, run.root, request.allowed)
    before = read_job(run) if run.job.exists() else None
    job = job.model_copy(update={"submissions": before.submissions if before else ()})
    _submit(run, job, slurm, "submitted")


def resubmit(run: RunDirectory) -> None:
    """Submit the job of a run once more, as it was.

    Raises:
        UserError: it has none.
        SlurmError: Slurm does not take it, or does not answer.
    """
    job = read_job(run)
    if job is None:
        raise UserError(
            f"{run.root} was never submitted by farspan (no {run.job.name} in it): `farspan launch "
            "slurm RECIPE --nodes N --run-dir DIR` does so"
        )
    # What it had to wait for is over.
    job = job.model_copy(update={"dependency": None})
    run.cancelled.unlink(missing_ok=True)
    _submit(run, job, Slurm(), "resubmitted")


def options_of(run: RunDirectory, job: Job, exclude: Sequence[str] = ()) -> list[str]:
    """What sbatch is told."""
    return sbatch_options(
        job.profile,
        name=job.name,
        nodes=job.nodes,
        folder=run.root,
        time=job.time,
        dependency=job.dependency,
        exclude=exclude,
    )


def name_of(run: RunDirectory) -> str:
    """Of a job whose run directory may be called anything."""
    return re.sub(r"[^\w.+-]+", "-", run.root.name) or "farspan"


def dependency_of(text: str | None) -> str | None:
    """As sbatch takes it: the number of a job alone is one that has to succeed.

    Raises:
        UserError: it is none.
    """
    if text is None:
        return None
    if re.fullmatch(r"\d+(_\d+)?", text):
        return f"afterok:{text}"
    if re.fullmatch(rf"{ONE_DEPENDENCY}(?:[,?]{ONE_DEPENDENCY})*", text):
        return text
    raise UserError(
        f"--dependency {text}: must be the number of a job that has to succeed first, as in 4711, "
        "or a dependency as sbatch takes it, as in afterany:4711:4712"
    )


def _submit(run: RunDirectory, job: Job, slurm: Slurm, why: str) -> None:
    exclude, cluster = _excluded(run, job, slurm), _cluster(slurm)
    _warn_of_another_cluster(job, cluster)
    # What the job reads when it starts is there before it can.
    write_job(run, job)
    variables = {"FARSPAN_PYTHON": job.python}
    number = slurm.submit(SCRIPT, options_of(run, job, exclude), [str(run.root)], variables)
    write_job(run, job.submitted(number, why, cluster))
    avoided = f", without {', '.join(exclude)}" if exclude else ""
    print(
        f"{why} job {number}, {job.name}: {job.nodes} nodes x {job.ranks_per_node} ranks{avoided}\n"
        f"its log: {run.root}/slurm-{number}.log\n"
        f"farspan launch status {shlex.quote(str(run.root))} --watch"
    )


def _cluster(slurm: Slurm) -> str:
    """Its name; "" where Slurm does not tell it, which is no reason to submit nothing."""
    with suppress(SlurmError):
        return slurm.config().get("ClusterName", "")
    return ""


def _warn_of_another_cluster(job: Job, cluster: str) -> None:
    """Nobody has asked there what became of the job before."""
    before = job.submissions[-1] if job.submissions else None
    if before and before.cluster and cluster and before.cluster != cluster:
        print(
            f"warning: job {before.id} of this run is one of the cluster {before.cluster}, and "
            f"{cluster} does not tell whether that has ended: if it waits or runs, cancel it "
            "there, or both will want the run",
            file=sys.stderr,
            flush=True,
        )


def _excluded(run: RunDirectory, job: Job, slurm: Slurm) -> list[str]:
    entries = excluded_now(run)
    if not entries:
        return []
    partition = partition_of(slurm.partitions(), job.profile).name
    nodes = nodes_of_site(slurm, job.profile)
    kept = avoidable(entries, nodes, job.nodes, partition, job.profile)
    return [entry.node for entry in kept]


def _problem_of_data(config: Config) -> str | None:
    """Why the run could not be prepared. The sample is made when it is."""
    from pretrain.data import open_stream, require_enough

    if SAMPLE_SHARDS in (source.path for source in config.data.sources()):
        return None
    try:
        require_enough(open_stream(config), config)
    except (DataError, UserError) as error:
        return str(error)
    return None


def _problem_of_state(run: RunDirectory, slurm: Slurm) -> str | None:
    """Why another job of the run would be one too many."""
    if not run.config.exists():
        return None
    state = read_state(run, slurm)
    if not state.is_live:
        return None
    return (
        f"{run.root} is {state.state} already ({state.where}): `farspan launch status` watches it, "
        "`farspan launch cancel` ends it"
    )


def _ask_slurm(run: RunDirectory, job: Job, checks: Checks, slurm: Slurm) -> None:
    """Let Slurm check what only it knows, such as limits of an account, and submit nothing."""
    try:
        checks.holds.append(f"Slurm: {slurm.when_it_would_start(SCRIPT, options_of(run, job))}")
    except SlurmError as error:
        # While too many nodes are down it says the same of a job that it takes.
        if checks.waits and "node configuration is not available" in str(error):
            return
        checks.problems.append(f"Slurm would refuse the job: {error}")


def _print_plan(run: RunDirectory, job: Job, checks: Checks) -> None:
    print(f"{checks}\n")
    command = ["sbatch", "--export=ALL", *options_of(run, job), str(SCRIPT), str(run.root)]
    print(f"FARSPAN_PYTHON={shlex.quote(job.python)} {shlex.join(command)}\n")
    print(f"{run.job}:\n{job.model_dump_json(indent=1)}\n")
    print(f"{SCRIPT}:\n{SCRIPT.read_text()}", end="", flush=True)
