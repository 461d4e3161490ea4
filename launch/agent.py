"""Run the ranks of a run on this machine, and start them again when they fail.

torchrun's agent does so: processes, rendezvous, and the count of restarts. What it is not told to
do here: end the others while they still find out who failed, end those that save after thirty
seconds, and restart what would fail again.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from torch.distributed.elastic.agent.server import WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from launch.cancelled import read_cancelled
from launch.causes import find_cause, rank_to_blame
from launch.environment import describe, environment_of_ranks, note_environment
from launch.failures import judge, note_failure
from launch.local import (
    LOOPBACK,
    Rank,
    StopSignals,
    end_ranks,
    free_port,
    note_pids,
    own_environment,
    stop_signals_blocked,
)
from launch.screen import Screen, screen_of
from pretrain.errors import CANNOT_GO_ON, LOST_RANK, STOPPED_ON_REQUEST, TrainingError
from pretrain.run_dir import RunDirectory

POLL_S = 0.1
# Long enough for the slowest thing a stopping rank does: a last checkpoint, W&B's last rows.
GRACE_S = 120.0
# How long the ranks that fail together take to be seen.
SETTLE_S = 1.0
# How long a rank that another has reported as failed takes to end.
LATE_S = 5.0
# How long the others take to find out who was killed, and in which collective (parallel.lost_rank).
DIAGNOSIS_S = 40.0
# How long the kernel takes at most to end a process that does not wait for something that is gone.
KILL_S = 30.0
RENDEZVOUS_S = 60
# The agent would end the ranks at these.
HANDLED_BY_TORCH = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def run_ranks(
    run: RunDirectory,
    command: Sequence[str],
    nproc: int,
    max_restarts: int,
    stop: StopSignals,
    plain: bool = False,
) -> tuple[int, int]:
    """Run `command` on `nproc` ranks to its end; rank 0's log is shown as it grows, on a terminal
    above a panel unless it should be plain.

    When a rank fails, the others are ended, the failed one's log is named, what it died of is
    noted, and a new attempt begins, unless the failure is one that would come again (see
    launch.failures). A run that was asked to stop is not restarted.

    Returns:
        The exit code, 0 or that of the rank to blame for the last failure (1 if it was killed),
        and the number of the last attempt.
    """
    if stop.requested:
        print("stopped on request before training began")
        return STOPPED_ON_REQUEST, 0
    # It reports what is told here in other words.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with closing(screen_of(run, stop, plain)) as screen:
        agent = _Agent(run, command, nproc, max_restarts, stop, screen)
        agent.run()
    return agent.exit_code, agent.attempt


class _AttemptLogs(LogsSpecs):
    """Makes an attempt each time the ranks are started: a folder with one log per rank, a number
    and a port in their environment.
    """

    def __init__(self, run: RunDirectory) -> None:
        super().__init__()
        self._run = run
        self.attempt = 0
        self.logs: list[Path] = []

    @property
    def root_log_dir(self) -> str:
        return str(self._run.attempts)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        is_first = not self.logs
        self.attempt = self._run.new_attempt()
        folder = self._run.folder_of(self.attempt)
        self.logs = [folder / f"rank-{rank}.log" for rank in envs]
        variables = environment_of_ranks(
            ranks=len(envs),
            ranks_here=len(envs),
            address=LOOPBACK,
            port=free_port(),
            attempt=self.attempt,
        )
        note_environment(self._run, self.attempt, variables)
        if is_first:
            print(f"environment of the ranks:\n{describe(variables)}", file=sys.stderr, flush=True)
        for rank, environment in envs.items():
            environment |= {one.name: one.value for one in variables} | own_environment(rank)
            # Ranks whose launcher was killed still need their store, to save what they have.
            environment["TORCHELASTIC_USE_AGENT_STORE"] = str(False)
        return LogsDest(
            stdouts={rank: str(log) for rank, log in enumerate(self.logs)},
            stderrs=dict.fromkeys(envs, ""),
            error_files=dict.fromkeys(envs, ""),
        )


class _Agent(LocalElasticAgent):
    def __init__(
        self,
        run: RunDirectory,
        command: Sequence[str],
        nproc: int,
        max_restarts: int,
        stop: StopSignals,
        screen: Screen,
    ) -> None:
        name = f"{run.root.name}-{os.getpid()}"
        rendezvous = StaticTCPRendezvous(LOOPBACK, free_port(), 0, 1, name, RENDEZVOUS_S)
        spec = WorkerSpec(
            role="rank",
            local_world_size=nproc,
            rdzv_handler=rendezvous,
            entrypoint=command[0],
            args=tuple(command[1:]),
            max_restarts=max_restarts,
            monitor_interval=POLL_S,
        )
        self._logs = _AttemptLogs(run)
        super().__init__(spec, self._logs)
        self._run = run
        self._max_restarts = max_restarts
        self._stop = stop
        self._ranks: list[Rank] = []
        self._screen = screen
        self._failed_at: float | None = None
        self._not_ended: list[int] = []
        # Another command counts failures anew.
        self._chain = f"process {os.getpid()} on {socket.gethostname()}, {time.time():.0f}"
        self.exit_code = 0

    @property
    def attempt(self) -> int:
        return self._logs.attempt

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        """Start an attempt."""
        is_restart = bool(self._ranks)
        handlers = {number: signal.getsignal(number) for number in HANDLED_BY_TORCH}
        with stop_signals_blocked():
            super()._initialize_workers(worker_group)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if is_restart:
                print(
                    f"restarting, attempt {self.attempt} of {self._run.root}; restarts left before "
                    f"it has to make progress: {self._remaining_restarts}",
                    file=sys.stderr,
                )
            assert isinstance(self._pcontext, SubprocessContext)
            handlers_of_ranks = self._pcontext.subprocess_handlers
            self._ranks = [handlers_of_ranks[rank].proc for rank in sorted(handlers_of_ranks)]
            self._failed_at, self.exit_code = None, 0
            note_pids(self._logs.logs[0].parent, [rank.pid for rank in self._ranks])
            self._screen.show(self.attempt, self._logs.logs[0])
            self._stop.pass_on_to(self._ranks)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._screen.refresh()
        codes = [rank.poll() for rank in self._ranks]
        if any(codes):
            if not self._have_settled(codes):
                return RunResult(WorkerState.HEALTHY)
            self._end_attempt(codes)
            if self._not_ended:
                return RunResult(WorkerState.FAILED)
        elif None not in codes:
            self._screen.close()
        return super()._monitor_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        # It would wait for ever for a rank that cannot be ended.
        if not self._not_ended:
            super()._shutdown(death_sig, timeout)

    def _have_settled(self, codes: Sequence[int | None]) -> bool:
        """Whether all have ended that fail together, or that stop together."""
        self._failed_at = self._failed_at or time.monotonic()
        failures = {code for code in codes if code}
        if self._stop.at_once:
            patience = SETTLE_S
        elif STOPPED_ON_REQUEST in failures:
            patience = GRACE_S
        elif failures == {LOST_RANK}:
            patience = LATE_S
        elif LOST_RANK in failures or min(failures) > 0:
            patience = SETTLE_S
        else:
            patience = DIAGNOSIS_S
        return None not in codes or time.monotonic() - self._failed_at > patience

    def _end_attempt(self, codes: Sequence[int | None]) -> None:
        """End what is left of a failed attempt, tell why it failed, and decide on another one."""
        self._not_ended = end_ranks(self._ranks, KILL_S)
        self._screen.close()
        failed = rank_to_blame(dict(enumerate(codes)))
        code = codes[failed]
        assert code
        self.exit_code = 1 if code < 0 or code in (LOST_RANK, CANNOT_GO_ON) else code
        if code == STOPPED_ON_REQUEST:
            print("stopped on request; everything is saved, the same command goes on from here")
        elif self._stop.at_once:
            print("ended at once; the same command goes on from the newest checkpoint")
        else:
            _explain(failed, codes, self._logs.logs)
        if self._not_ended:
            print(
                f"not restarted: SIGKILL does not end {_named(self._not_ended)}: the kernel waits "
                "for a device, or a file system that is gone (/proc/PID/stack says where). After "
                "its end the same command goes on from the newest checkpoint",
                file=sys.stderr,
            )
        self._remaining_restarts = 0
        if code != STOPPED_ON_REQUEST and not self._stop.at_once and self._is_ours():
            self._decide(codes)

    def _is_ours(self) -> bool:
        """Whether the run directory is still there, and no other attempt has taken over."""
        is_there = self._run.folder_of(self.attempt).is_dir()
        return is_there and self._run.current_attempt() <= self.attempt

    def _decide(self, codes: Sequence[int | None]) -> None:
        """Note what the attempt died of; give the run another one, or say why not."""
        cancelled = read_cancelled(self._run)
        if cancelled and cancelled.holds_for([self._chain]):
            print(f"ended at once, cancelled by {cancelled.by}", flush=True)
            return
        by_rank = dict(enumerate(codes))
        host = [socket.gethostname()] * len(codes)
        cause = find_cause(self._run.folder_of(self.attempt), by_rank, nodes=host)
        try:
            note_failure(self._run, self.attempt, self._chain, cause)
        except (OSError, TrainingError) as error:
            print(f"not restarted: {error}", file=sys.stderr)
            return
        verdict = judge(self._run, self._chain, self._max_restarts)
        if self._stop.requested or self._not_ended:
            return
        if verdict.goes_on:
            # The agent takes one for the restart itself.
            self._remaining_restarts = verdict.starts_left + 1
        elif self._max_restarts and cause.kind not in ("mistake", "final"):
            print(verdict.text, file=sys.stderr)


def _named(pids: Sequence[int]) -> str:
    return f"process{'es' if len(pids) > 1 else ''} {', '.join(map(str, pids))}"


def _explain(failed: int, codes: Sequence[int | None], logs: Sequence[Path]) -> None:
    """Say which rank failed and why."""
    code = codes[failed]
    assert code
    if code == LOST_RANK:
        print(f"the job lost a rank; the logs: {logs[failed].parent}", file=sys.stderr)
    else:
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        print(f"rank {failed} {how}; its log: {logs[failed]}", file=sys.stderr)
    survivors = [rank for rank, code in enumerate(codes) if code == LOST_RANK]
    # The log of rank 0 has been shown.
    if failed != 0 and code != LOST_RANK:
        sys.stderr.write("".join(_tail(logs[failed], 20)))
    if survivors and 0 not in survivors:
        sys.stderr.write("".join(_tail(logs[survivors[0]], 1)))


def _tail(log: Path, lines: int) -> list[str]:
    with suppress(FileNotFoundError):
        return log.read_text(errors="replace").splitlines(True)[-lines:]
    return []
