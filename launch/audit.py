"""`farspan audit`: prove from a run's ledger that its data was used exactly as the mixture says."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from data_pipeline.mixture import Mixture
from data_pipeline.order import Visits
from data_pipeline.shards import TokenReader, load_manifest
from launch.audit_checks import (
    CheckpointCheck,
    MetricsCheck,
    OrderCheck,
    StepsCheck,
    data_problems,
)
from launch.audit_use import SharesCheck, SourceUse, UseCheck
from launch.progress import show_progress
from pretrain.config import Config, read_run_config
from pretrain.data import cache_of, curriculum_of, sources_of
from pretrain.errors import UserError
from pretrain.lineage import Undone, read_lineage
from pretrain.run_dir import RunDirectory

# For the numbers of a long run, also where standard output is no terminal.
TABLE_WIDTH = 120

Progress = Callable[[int, int], None]


class AuditError(Exception):
    """The audit cannot be made, through no mistake of the user's: told without a traceback."""

    exit_code = 1


@dataclass(frozen=True)
class Audit:
    """What the ledger of a run says, and what of it does not hold.

    Attributes:
        steps: the last step.
        undone_by_restarts: trained, and trained again by a later attempt.
        undone_by_rollbacks: trained, and given up.
        unfinished_tokens: of lanes (context.lane_rows) that have not ended; only their order
            is checked.
        late_records: of attempts that had been replaced; they do not count.
        goodput: share of all trained tokens that were not undone.
    """

    attempts: int
    steps: int
    trained_tokens: int
    skipped_tokens: int
    undone_by_restarts: Undone
    undone_by_rollbacks: Undone
    unfinished_tokens: int
    late_records: int
    goodput: float
    sources: tuple[SourceUse, ...]
    problems: tuple[str, ...]


def print_audit(directory: Path, as_json: bool) -> None:
    """Audit a run and print the result; exit code 1 if something does not hold."""
    # The result alone goes to standard output.
    with show_progress(Console(stderr=True)) as show:
        audit = audit_run(RunDirectory(directory), partial(show, "batches checked"))
    if as_json:
        print(json.dumps(asdict(audit) | {"holds": not audit.problems}))
    else:
        _print(audit)
    if audit.problems:
        raise typer.Exit(1)


def audit_run(run: RunDirectory, progress: Progress = lambda done, total: None) -> Audit:
    """Compare a run's ledger with its data, its checkpoints and its metrics.

    Memory: 28 bytes per document of the data, about 60 per step.

    Raises:
        UserError: no run, or one without a ledger.
        AuditError: the newest checkpoint is damaged.
        LedgerError: the ledger is damaged.
        DataError: the data is not there, or damaged.
    """
    config = read_run_config(run)
    if not run.ledger.is_file():
        raise UserError(
            f"{run.root} has no {run.ledger.name}: the run has not begun, or an older farspan made "
            "it; there is nothing to audit"
        )
    # A run that is alive appends to the ledger first.
    checkpoint, metrics = (
        CheckpointCheck(_newest_checkpoint(config, run)),
        MetricsCheck(run.metrics),
    )
    lineage = read_lineage(run.ledger)
    sources = config.data.sources()
    paths = [source.path for source in sources]
    cache = cache_of(config.data)
    manifests = [
        load_manifest(source.path, growing=source.growing, cache=cache) for source in sources
    ]
    readers = [TokenReader(manifest) for manifest in manifests]
    visits = [Visits(source.times) for source in sources_of(config.data)]
    steps, use = StepsCheck(), UseCheck(paths, [reader.lengths for reader in readers], visits)
    problems = data_problems(lineage.attempts, manifests)
    if not problems:
        order, shares = OrderCheck(paths, readers), SharesCheck(paths, readers)
        checks = (steps, order, use, shares, checkpoint, metrics)
        for number, (attempt, batch) in enumerate(lineage.batches(), 1):
            pieces = batch.plan().pieces
            for check in checks:
                check.see(attempt, batch, pieces)
            progress(number, len(lineage.kept))
        problems = [problem for check in checks for problem in check.problems()]

    mixture = Mixture(
        readers,
        sources_of(config.data),
        config.data.seed,
        shuffle_shards=config.data.shuffle_shards,
        curriculum=curriculum_of(config),
    )
    uses = use.of_sources(mixture.outlook(use.delivered))
    trained = sum(source.trained_tokens for source in uses)
    undone = lineage.undone_by_restarts, lineage.undone_by_rollbacks
    return Audit(
        attempts=len(lineage.attempts),
        steps=steps.last,
        trained_tokens=trained,
        skipped_tokens=sum(sum(source.skipped_tokens.values()) for source in uses),
        undone_by_restarts=lineage.undone_by_restarts,
        undone_by_rollbacks=lineage.undone_by_rollbacks,
        unfinished_tokens=use.unfinished_tokens,
        late_records=lineage.late,
        goodput=trained / max(1, trained + sum(each.tokens for each in undone)),
        sources=uses,
        problems=tuple(problems),
    )


def _newest_checkpoint(config: Config, run: RunDirectory) -> dict[str, Any] | None:
    """How far the newest finished checkpoint has come. Raises AuditError if that is not known."""
    from pretrain.checkpoint.manifest import DamageError, Manifest
    from pretrain.checkpoint.store import checkpoint_in, saved_steps
    from pretrain.checkpoint.trained import checkpoints_of

    target = checkpoints_of(config, run)
    saved = saved_steps(target)
    if not saved:
        return None
    try:
        return Manifest.read(checkpoint_in(target, saved[-1])).progress
    except DamageError as error:
        raise AuditError(
            f"the newest checkpoint, of step {saved[-1]}, is damaged: {error}. The next attempt "
            "sets it aside and goes on from the one before; audit the run then"
        ) from None


def _print(audit: Audit) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"{audit.steps:,} steps in {audit.attempts:,} attempts: {audit.trained_tokens:,} tokens "
        f"trained, {audit.skipped_tokens:,} skipped\n"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("source", "trained", "skipped", "documents", "epochs", "used", "share", "mixture"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, source in enumerate(audit.sources):
        console.print(f"source {number}: {source.path}")
        table.add_row(
            str(number),
            f"{source.trained_tokens:,}",
            f"{sum(source.skipped_tokens.values()):,}",
            f"{source.documents:,}",
            f"{source.epochs:.3f}",
            _times(source.least_used, source.most_used),
            f"{source.share:.3%}",
            f"{source.mixture_share:.3%}",
        )
    console.print()
    console.print(table, width=max(console.width, TABLE_WIDTH))
    console.print()
    for number, source in enumerate(audit.sources):
        for reason, tokens in source.skipped_tokens.items():
            console.print(f"skipped of source {number}: {tokens:,} tokens, {reason}")
    for cause, undone in (
        ("restarts", audit.undone_by_restarts),
        ("rollbacks", audit.undone_by_rollbacks),
    ):
        console.print(f"undone by {cause}: {undone.steps:,} steps, {undone.tokens:,} tokens")
    if audit.unfinished_tokens:
        console.print(
            f"checked in their order alone: {audit.unfinished_tokens:,} tokens of lanes that have "
            "not ended"
        )
    if audit.late_records:
        console.print(f"ignored: {audit.late_records:,} records of attempts that had been replaced")
    console.print(f"goodput: {audit.goodput:.2%} of the tokens trained\n")
    if not audit.problems:
        console.print("every token was used exactly as often as the mixture says")
    for problem in audit.problems:
        console.print(f"does not hold: {problem}")


def _times(least: int, most: int) -> str:
    return f"{least} times" if least == most else f"{least}-{most} times"
