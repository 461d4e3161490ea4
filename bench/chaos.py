"""Kill a run again and again, and prove that nothing of it was lost.

    python -m bench.chaos [--kills 100] [--seed 0] [--goodput-kills 4]

A small hybrid model, of linear and softmax layers, trains on 1, 2 and 4 ranks. One rank, or all at
once, are killed (SIGKILL) at a random moment, and the run is started again, until it has come to
its end; then another run begins, until no kills are left. There are three kinds of runs, each
compared with one that nobody interrupted:

- the same layout at each start, with experts: the losses have to be bitwise equal;
- another layout at each start (tensor, context, pipeline, data parallel and their combinations),
  dense, 20 steps: equal to 1e-5;
- another layout at each start (expert parallel as well), with experts, 6 steps at a learning rate
  of at most 1e-3: equal to 1e-5. Layouts sum in different orders, and what differs in the eighth
  digit flips the choice of an expert sooner or later: correct runs part then. It does not happen
  within so few steps, which is what is promised.

After each kill all checkpoints that count are verified, and the newest that was committed has to be
among them. At the end of a run `farspan audit` must find each token used exactly as often as the
mixture says.

Moments: `startup` is before an attempt's first step, `step` between its first and its last,
`checkpoint write` while files of a checkpoint are there and its manifest is not, `end` after the
last step.

Then the goodput of a run that loses a rank every 30 steps and is started again by itself: the time
that its steps and its restarts would take if no step had to be done twice and no checkpoint ever
blocked, over the time that it took. A restart lasts from the kill to the end of the first step
after it. Exit code 1: something was lost, or the goodput is below 90 %.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median

from launch.audit import audit_run
from launch.local import rank_pids
from pretrain.checkpoint.manifest import DamageError
from pretrain.checkpoint.store import check_alone, checkpoint_in, saved_steps
from pretrain.checkpoint.target import Target
from pretrain.run_dir import RunDirectory

Layout = tuple[str, ...]

ONE_RANK: Layout = ("--nproc", "1")
SAME: Layout = ("--nproc", "2", "parallel.ep=2")
SETTINGS = ("data.seq_len=64", "schedule.name=constant", "wandb.mode=disabled")


@dataclass(frozen=True)
class Kind:
    """Runs of one kind.

    Attributes:
        share: of the kills.
        steps: of each run.
        checkpoint_every: steps.
        tolerance: how far a loss may be from that of the run that was not interrupted, relative.
    """

    name: str
    share: float
    settings: Layout
    layouts: tuple[Layout, ...]
    reference: Layout
    steps: int
    checkpoint_every: int
    tolerance: float


KINDS = (
    Kind("experts, same layout", 0.3, (), (SAME,), SAME, 12, 3, 0.0),
    Kind(
        "dense, changing layouts",
        0.4,
        ("model.moe.n_experts=0",),
        (
            ONE_RANK,
            ("--nproc", "2"),
            ("--nproc", "2", "parallel.tp=2"),
            ("--nproc", "2", "parallel.cp=2"),
            ("--nproc", "2", "parallel.pp=2", "train.microbatch=1"),
            ("--nproc", "4", "parallel.cp=2", "parallel.tp=2"),
            ("--nproc", "4", "parallel.pp=2", "parallel.cp=2", "train.microbatch=1"),
            ("--nproc", "2", "parallel.dp_replicate=2"),
        ),
        ONE_RANK,
        20,
        2,
        1e-5,
    ),
    Kind(
        "experts, changing layouts",
        0.3,
        ("optim.lr=1e-3",),
        (
            ONE_RANK,
            SAME,
            ("--nproc", "2", "parallel.tp=2"),
            ("--nproc", "2", "parallel.cp=2", "parallel.ep=2"),
            ("--nproc", "2", "parallel.pp=2", "train.microbatch=1"),
            ("--nproc", "4", "parallel.cp=2", "parallel.ep=4"),
            ("--nproc", "4", "parallel.pp=2", "parallel.ep=2", "train.microbatch=1"),
            ("--nproc", "2", "parallel.dp_replicate=2"),
        ),
        ONE_RANK,
        6,
        1,
        1e-5,
    ),
)
MOMENTS = ("startup", "step", "checkpoint write", "end")
COLUMNS = (
    *("kind of run", "runs", f"killed at {MOMENTS[0]}", *MOMENTS[1:], "restarts"),
    *("ledger exact", "loss deviation", "half checkpoints", "minutes"),
)
# How often each of these is waited for; the end comes by itself.
WEIGHTS = {"startup": 1, "step": 2, "checkpoint write": 2}
ALL_RANKS_SHARE = 0.25
# Of a start, until one has been measured.
START_S = 4.0
KILL_EVERY, GOODPUT_STEPS_BETWEEN_CHECKPOINTS = 30, 2
REQUIRED_GOODPUT = 0.9
POLL_S = 0.01


@dataclass
class Tally:
    """What became of runs."""

    runs: int = 0
    attempts: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    is_exact: bool = True
    deviation: float = 0.0
    bad_checkpoints: int = 0
    start_s: list[float] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.runs += other.runs
        self.attempts += other.attempts
        self.kills += other.kills
        self.is_exact &= other.is_exact
        self.deviation = max(self.deviation, other.deviation)
        self.bad_checkpoints += other.bad_checkpoints
        self.start_s += other.start_s


class Killer:
    """Starts runs of one kind, and kills their ranks."""

    def __init__(self, kind: Kind, folder: Path, draw: random.Random) -> None:
        folder.mkdir()
        self.kind, self.folder, self.draw = kind, folder, draw
        self.tally = Tally()
        layouts = list(kind.layouts)
        draw.shuffle(layouts)
        self._layouts: Iterator[Layout] = cycle(layouts)
        self._log = folder / "launcher.log"

    def use_up(self, kills: int) -> None:
        """Run after run, kill ranks so often, and compare each run with one left in peace."""
        whole = RunDirectory(self.folder / "whole")
        self._finish(whole, self.kind.reference)
        expected = losses(whole)
        left = kills
        while left:
            self.tally.runs += 1
            run = RunDirectory(self.folder / f"run-{self.tally.runs}")
            while left and self._kill_once(run):
                left -= 1
            if not run.done.exists():
                self._finish(run, next(self._layouts))
            self._judge(run, expected)

    def _judge(self, run: RunDirectory, expected: list[float]) -> None:
        found = losses(run)
        errors = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
        self.tally.deviation = max(self.tally.deviation, *errors)
        for problem in (problems := audit_run(run).problems):
            print(f"{run.root.name} of {self.kind.name}: {problem}", flush=True)
        self.tally.is_exact &= not problems
        self.tally.attempts += number_of_attempts(run)
        shutil.rmtree(run.root)

    def _start(self, run: RunDirectory, layout: Layout) -> subprocess.Popen[bytes]:
        kind = self.kind
        command = (sys.executable, "-m", "launch.cli", "train", "tiny-hybrid-moe")
        where = ("--run-dir", str(run.root), "--max-restarts", "0")
        often = (f"train.steps={kind.steps}", f"checkpoint.every={kind.checkpoint_every}")
        return start((*command, *where, *layout, *SETTINGS, *kind.settings, *often), self._log)

    def _finish(self, run: RunDirectory, layout: Layout) -> None:
        if code := self._start(run, layout).wait():
            raise SystemExit(f"a run did not end well ({code}):\n{self._log.read_text()}")

    def _kill_once(self, run: RunDirectory) -> bool:
        """Start, and kill at a random moment; False if the run was over before."""
        attempts = number_of_attempts(run)
        began, process = time.monotonic(), self._start(run, next(self._layouts))
        is_time = self._random_moment(run)
        stepped_at = None
        while process.poll() is None:
            if number_of_attempts(run) > attempts:
                if stepped_at is None and has_stepped(run):
                    stepped_at = time.monotonic()
                if is_time():
                    break
            time.sleep(POLL_S)
        moment = self._moment(run)
        if process.poll() is None:
            self._kill(run)
        if stepped_at is not None:
            self.tally.start_s.append(stepped_at - began)
        if process.wait() == 0:
            return False
        if "killed by signal 9" not in (output := self._log.read_text()):
            raise SystemExit(f"a run did not end as one that lost a rank:\n{output}")
        self.tally.kills[moment] += 1
        self.tally.bad_checkpoints += bad_checkpoints(run)
        return True

    def _kill(self, run: RunDirectory) -> None:
        ranks = rank_pids(run)
        is_all = self.draw.random() < ALL_RANKS_SHARE
        for rank in ranks if is_all else [self.draw.choice(ranks)]:
            # One may just have come to its end.
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)

    def _random_moment(self, run: RunDirectory) -> Callable[[], bool]:
        """Tells, asked again and again from when the ranks are there, when it has come."""
        moment = self.draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if moment == "startup":
            return self._after(self.draw.uniform(0, median(self.tally.start_s or [START_S])))
        if moment == "step":
            return self._steps_from_now(run, self.draw.randrange(1, 5))
        return lambda: is_half_written(run)

    def _after(self, seconds: float) -> Callable[[], bool]:
        began: list[float] = []

        def is_over() -> bool:
            began.append(time.monotonic())
            return began[-1] - began[0] >= seconds

        return is_over

    def _steps_from_now(self, run: RunDirectory, steps: int) -> Callable[[], bool]:
        def are_done() -> bool:
            lines = log_of(run).count("\nstep ")
            return lines >= steps or (lines > 0 and last_step(run) == self.kind.steps)

        return are_done

    def _moment(self, run: RunDirectory) -> str:
        if is_half_written(run):
            return "checkpoint write"
        if not has_stepped(run):
            return "startup"
        return "end" if last_step(run) == self.kind.steps else "step"


def start(command: tuple[str, ...], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def number_of_attempts(run: RunDirectory) -> int:
    """Of those whose ranks are there."""
    return len(list(run.attempts.glob("*/pids.json")))


def log_of(run: RunDirectory) -> str:
    """Of rank 0 of the newest attempt whose ranks are there."""
    attempts = sorted(run.attempts.glob("*/pids.json"))
    return (attempts[-1].parent / "rank-0.log").read_text() if attempts else ""


def has_stepped(run: RunDirectory) -> bool:
    return "\nstep " in log_of(run)


def last_step(run: RunDirectory) -> int:
    try:
        lines = run.metrics.read_bytes().splitlines()
        return int(json.loads(lines[-1])["train/step"])
    except (FileNotFoundError, IndexError, ValueError):
        return 0


def losses(run: RunDirectory) -> list[float]:
    return [json.loads(line)["train/loss"] for line in run.metrics.read_text().splitlines()]


def is_half_written(run: RunDirectory) -> bool:
    """Whether the newest attempt is writing a checkpoint."""
    ours = f"attempt-{number_of_attempts(run):04d}-*"
    # Folders come and go.
    with suppress(FileNotFoundError):
        return any(
            not (folder / "manifest.json").exists() and any(folder.glob(ours))
            for folder in run.checkpoints.glob("step-*")
        )
    return False


def bad_checkpoints(run: RunDirectory) -> int:
    """How many checkpoints count and are not whole, or were committed and are not there."""
    checkpoints, bad = Target(str(run.checkpoints)), 0
    saved = saved_steps(checkpoints)
    for step in saved:
        try:
            check_alone(checkpoint_in(checkpoints, step))
        except DamageError as error:
            bad += 1
            print(f"{run.root.name}: {error}", flush=True)
    committed = json.loads(run.saved.read_text())["step"] if run.saved.exists() else 0
    if committed > max(saved, default=0):
        bad += 1
        print(f"{run.root.name}: the checkpoint of step {committed} is gone", flush=True)
    return bad


def survive(folder: Path, kills: int, seed: int) -> bool:
    """Kill runs of all kinds so often; print what became of them. Whether nothing was lost."""
    print("|", " | ".join(COLUMNS), "|\n|---" + "|---:" * (len(COLUMNS) - 1) + "|", flush=True)
    total, is_well, left, began = Tally(), True, kills, time.monotonic()
    for number, kind in enumerate(KINDS):
        is_last = number == len(KINDS) - 1
        share = left if is_last else round(kind.share * kills)
        left -= share
        if not share:
            continue
        kind_began = time.monotonic()
        killer = Killer(kind, folder / str(number), random.Random(seed + number))
        killer.use_up(share)
        tally = killer.tally
        print_row(kind.name, tally, time.monotonic() - kind_began)
        is_well &= tally.is_exact and tally.deviation <= kind.tolerance
        is_well &= not tally.bad_checkpoints and tally.kills.total() == share
        total.add(tally)
    print_row("all", total, time.monotonic() - began)
    if total.start_s:
        print(
            f"\na start takes {median(total.start_s):.1f} s to the end of its first step (median)"
        )
    return is_well


def print_row(name: str, tally: Tally, seconds: float) -> None:
    cells = (
        name,
        tally.runs,
        *(tally.kills[moment] for moment in MOMENTS),
        tally.attempts - tally.runs,
        "yes" if tally.is_exact else "NO",
        f"{tally.deviation:.1e}" if tally.deviation else "bitwise",
        tally.bad_checkpoints,
        f"{seconds / 60:.1f}",
    )
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def measure_goodput(folder: Path, kills: int) -> bool:
    """Lose a rank every 30 steps, and go on without anybody's help."""
    steps = KILL_EVERY * (kills + 1)
    run = RunDirectory(folder / "goodput")
    settings = (*SETTINGS, f"train.steps={steps}", "data.seq_len=1024", "train.dtype=float32")
    often = f"checkpoint.every={GOODPUT_STEPS_BETWEEN_CHECKPOINTS}"
    command = (sys.executable, "-m", "launch.cli", "train", "tiny-hybrid-moe")
    began, log = time.monotonic(), folder / "goodput.log"
    where = ("--run-dir", str(run.root), "--max-restarts", "3")
    process = start((*command, *where, *SAME, *settings, often), log)
    starts, first_steps, draw = [began], [], random.Random(1)
    for kill in range(1, kills + 2):
        attempts = len(starts)
        while number_of_attempts(run) < attempts or not has_stepped(run):
            check_alive(process, log)
            time.sleep(POLL_S)
        first_steps.append(time.monotonic())
        if kill > kills:
            break
        while last_step(run) < KILL_EVERY * kill:
            check_alive(process, log)
            time.sleep(POLL_S)
        os.kill(draw.choice(rank_pids(run)), signal.SIGKILL)
        starts.append(time.monotonic())
    process.wait()
    took = time.monotonic() - began
    if process.returncode:
        raise SystemExit(f"the run did not end well:\n{log.read_text()}")
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    step_s = median(row["perf/step_s"] for row in rows)
    restarts = sum(first - start for first, start in zip(first_steps, starts, strict=True))
    # The first step of an attempt is among what `restarts` counts.
    allowed = restarts + step_s * (steps - len(starts))
    goodput = allowed / took
    print(
        f"\ngoodput: a kill every {KILL_EVERY} steps of {step_s:.2f} s, {kills} in all; "
        f"{restarts / len(starts):.1f} s a start; {took:.0f} s in all, of which starts and steps "
        f"alone allow {allowed:.0f} s: {goodput:.1%}",
        flush=True,
    )
    return goodput >= REQUIRED_GOODPUT


def check_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        raise SystemExit(f"the run ended too early:\n{log.read_text()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--goodput-kills", type=int, default=4)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    results = []
    try:
        if options.kills:
            results.append(survive(folder, options.kills, options.seed))
        if options.goodput_kills:
            results.append(measure_goodput(folder, options.goodput_kills))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
