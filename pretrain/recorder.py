"""What rank 0 writes down while a run trains: the ledger, the metrics, and lines for its log."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from pretrain.attempt import is_requeued, process_started
from pretrain.config import Config, phases_of
from pretrain.data import curriculum_of, source_names
from pretrain.data_config import ShardSource
from pretrain.guard import Rollback, Verdict
from pretrain.ledger import Ledger, LedgerSource
from pretrain.metrics.expert_load import DeadExperts
from pretrain.metrics.goodput import Cause, Goodput
from pretrain.metrics.registry import check_names
from pretrain.metrics.samples import Beginnings
from pretrain.metrics.sinks import JsonlSink, MetricsWriter, last_row, row_lacks, step_line
from pretrain.metrics.wandb_sink import WandbSink
from pretrain.numerics import numerics_of
from pretrain.run_dir import RunDirectory, write_atomically
from pretrain.trainer import StepResult, Trainer

NAMED_AT_MOST = 8
# The reason for skipping what has been skipped before.
PASSED_OVER = "skipped before"


class Recorder:
    """Opens ledger and metrics where `trainer` stands.

    Args:
        config: of the whole run, of which that of `trainer` may be a phase.
    """

    def __init__(self, run: RunDirectory, attempt: int, trainer: Trainer, config: Config) -> None:
        fence = partial(run.check_attempt, attempt)
        self._steps = config.train.steps
        self._aside = run.aside(attempt)
        # With the rows of all steps, also of those that are undone.
        self._goodput = Goodput(run, attempt, process_started(), is_requeued=is_requeued())
        self._rows = JsonlSink(run.metrics)
        self._rows.cut_back(trainer.progress.step, self._aside)
        self._goodput.undo()
        self._goodput.save()
        data = config.data
        self.ledger = Ledger.open(
            run.ledger,
            attempt,
            trainer.progress.step,
            trainer.stream.tokens,
            seed=trainer.stream.seed,
            sources=_ledger_sources(data.sources(), trainer.stream.state_dict()),
            shuffle_shards=data.shuffle_shards,
            curriculum=[(phase.tokens, phase.weights) for phase in curriculum_of(config)],
            lanes=[
                (phase.first + 1, phase.config.context.lane_rows) for phase in phases_of(config)
            ],
            fence=fence,
        )
        write_atomically(run.config_of(attempt), config.to_yaml())
        ranks = {"ranks": dist.get_world_size(), "layout": str(trainer.layout)}
        ranks |= numerics_of(config, trainer.device)
        write_atomically(run.ranks_of(attempt), json.dumps(ranks) + "\n")
        self._mirror = WandbSink(run, config)
        self._metrics = MetricsWriter([self._rows, self._mirror], fence)
        self._dead_experts = DeadExperts(config.guard.window)
        self._run, self._attempt = run, attempt
        self._last_step = self._saved = trainer.progress.step
        self._skipped = self._rollbacks = 0
        self._samples = config.wandb.samples if config.wandb.mode != "disabled" else 0

    def enter(self, trainer: Trainer, result: StepResult) -> None:
        """Enter what became of the batches of a step."""
        self._goodput.add_step(result.agreed.data_wait_s, is_taken=result.verdict is None)
        step = trainer.progress.step + (result.verdict is not None)
        seq_len = trainer.config.data.seq_len
        for plan, first_token in result.passed_over:
            nan = float("nan")
            self.ledger.skip(step, plan, seq_len, first_token, PASSED_OVER, nan, nan)
        batch = trainer.plan, seq_len, trainer.first_token
        measured = result.measured.loss, result.norms.whole
        if result.verdict:
            self.ledger.skip(step, *batch, result.verdict.reason, *measured)
        else:
            self.ledger.train(step, *batch, *measured)
            self._warn_of_dead_experts(step, result)
            if self._samples:
                self._show_samples(trainer)
        self._skipped += len(result.passed_over) + (result.verdict is not None)
        self._last_step = step

    def warn_of_skip(self, verdict: Verdict) -> None:
        what = f"step {self._last_step}: {verdict.reason}; batch skipped"
        print(f"warning: {what}", flush=True)
        self._mirror.alert("batch skipped", what)
        self._goodput.spend("skipped batches")

    def enter_rollback(self, rollback: Rollback) -> None:
        """Enter that the run is about to go back: from here on it cannot forget to."""
        skip = rollback.skip.first, rollback.skip.stop
        self.ledger.begin_rollback(
            rollback.step,
            rollback.reason,
            rollback.to_step,
            skip,
            rollback.nearby,
            rollback.settled_at,
        )

    def enter_rolled_back(self, trainer: Trainer, rollback: Rollback) -> None:
        """Enter where a run stands that has gone back."""
        step = trainer.progress.step
        self.ledger.roll_back(rollback.step, step, trainer.stream.tokens)
        self.ledger.sync()
        self._rows.cut_back(step, self._aside)
        self._goodput.undo()
        self._goodput.spend("undone steps")
        self._goodput.save()
        self._rollbacks += 1
        batches = (rollback.skip.stop - rollback.skip.first) // trainer.tokens_per_step
        what = (
            f"step {rollback.step}: {rollback.reason}; rolled back to step {step}, "
            f"{batches} {'batch' if batches == 1 else 'batches'} will be skipped"
        )
        print(f"warning: {what}", flush=True)
        self._mirror.alert("rolled back", what)

    def enter_checkpoint(self, trainer: Trainer) -> None:
        """Enter the newest finished checkpoint, if it is a new one."""
        newest = trainer.store.newest
        if newest is not None and newest != self._saved:
            self._run.mark_saved(newest, self._attempt, str(trainer.store.target))
            self._saved = newest
            self._goodput.spend("checkpoints")
            self._goodput.save()

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics, and the line that a log shows of it."""
        guard = {"guard/skipped": self._skipped, "guard/rollbacks": self._rollbacks}
        self._goodput.spend("logging")
        row = {**row, **guard, **self._goodput.metrics()}
        self._metrics.log(row)
        print(step_line(row, self._steps), flush=True)
        self._goodput.spend("logging")

    def spent_on(self, cause: Cause) -> None:
        """What has passed since anything was entered was spent on this."""
        self._goodput.spend(cause)

    def lacks(self, step: int, name: str) -> bool:
        """Whether the newest row is that of `step`, and does not have this metric."""
        return row_lacks(self._rows.path, step, name)

    def amend(self, more: dict[str, Any]) -> None:
        """Add metrics to the newest row."""
        row = last_row(self._rows.path) | more
        check_names(row)
        self._metrics.check_attempt()
        self._rows.cut_back(row["train/step"] - 1, self._aside, [row])
        self._mirror.write({"train/step": row["train/step"], **more})
        print(step_line(row, self._steps), flush=True)

    def close(self) -> None:
        self._goodput.spend("logging")
        self._goodput.save(is_stopped=True)
        self._metrics.close()

    def _show_samples(self, trainer: Trainer) -> None:
        """Show W&B the first batch of the attempt, of which this rank has just read its rows."""
        rows = min(self._samples, trainer.config.train.global_batch // trainer.engine.data_ranks)
        beginnings = Beginnings.of(trainer.stream, trainer.plan, rows)
        self._mirror.show(beginnings, source_names(trainer.config.data))
        self._samples = 0

    def _warn_of_dead_experts(self, step: int, result: StepResult) -> None:
        dead = self._dead_experts.add(result.measured.expert_counts)
        if dead:
            named = ", ".join(
                f"{expert} of layer {layer}" for layer, expert in dead[:NAMED_AT_MOST]
            )
            more = f" and {len(dead) - NAMED_AT_MOST} more" if len(dead) > NAMED_AT_MOST else ""
            print(
                f"warning: step {step}: no token has chosen expert {named}{more} since many steps "
                "(guard.window); more model.moe.aux_loss, or model.moe.balance=bias, may help",
                flush=True,
            )


def _ledger_sources(sources: Sequence[ShardSource], state: Mapping[str, Any]) -> list[LedgerSource]:
    return [
        LedgerSource(
            sha256=sha256,
            shards=shards if source.growing else None,
            weight=source.relative_weight,
            **source.model_dump(exclude={"path", "weight"}),
        )
        for source, sha256, shards in zip(sources, state["data"], state["shards"], strict=True)
    ]
