"""Kill a run again and again, and prove that nothing of it was lost.

    python -m bench.chaos [--kills 100] [--seed 0] [--goodput-kills 6]

A small model trains on 1 or 2 ranks. Of its ranks one is killed (SIGKILL) at a random moment: while
it starts, between two steps, or while a checkpoint is being written. Then it starts again, half of
the kills on another layout (tensor, context, pipeline or expert parallel, or one rank), half always
on the same. After each kill every checkpoint that counts is verified. At the end `farspan audit`
must find each token used exactly as often as the mixture says, and the losses must be those of a
run that was never interrupted: bitwise on the same layout, to 1e-4 where it changed.

Then the goodput of a run that loses a rank every 30 steps and is started again by itself: the time
that its steps and its restarts would take if no step had to be done twice and no checkpoint ever
blocked, over the time that it took. Exit code 1: something was lost, or the goodput is below 90 %.
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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

from launch.local import rank_pids
from pretrain.checkpoint.store import check_alone, checkpoint_in, saved_steps
from pretrain.checkpoint.target import Target
from pretrain.run_dir import RunDirectory

Layout = tuple[str, ...]

SAME: Layout = ("--nproc", "2", "parallel.ep=2")
LAYOUTS: tuple[Layout, ...] = (
    ("--nproc", "1"),
    ("--nproc", "2"),
    ("--nproc", "2", "parallel.tp=2"),
    ("--nproc", "2", "parallel.cp=2"),
    ("--nproc", "2", "parallel.pp=2", "train.microbatch=1"),
)
SETTINGS = ("data.seq_len=64", "schedule.name=constant", "wandb.mode=disabled")
DENSE = ("model.moe.n_experts=0", "optim.lr=1e-4")
# How often a rank is killed in each of these moments.
MOMENTS = {"start": 1, "step": 2, "checkpoint": 2}
STEPS_PER_KILL = 8
TOLERANCE = 1e-4
KILL_EVERY, GOODPUT_STEPS_BETWEEN_CHECKPOINTS = 30, 2
REQUIRED_GOODPUT = 0.9
POLL_S = 0.002


class Chaos:
    """One run, which is killed and started again."""

    def __init__(self, folder: Path, steps: int, draw: random.Random, *settings: str) -> None:
        self.run = RunDirectory(folder / "killed")
        self.whole = RunDirectory(folder / "whole")
        self.checkpoints = Target(str(self.run.checkpoints))
        self.settings = (*SETTINGS, *settings, f"train.steps={steps}", "checkpoint.every=3")
        self.draw = draw
        self.moments: Counter[str] = Counter()

    def train(self, run: RunDirectory, layout: Layout) -> subprocess.Popen[str]:
        command = (sys.executable, "-m", "launch.cli", "train", "tiny-hybrid-moe")
        where = ("--run-dir", str(run.root), "--max-restarts", "0")
        return subprocess.Popen(
            [*command, *where, *layout, *self.settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def finish(self, run: RunDirectory, layout: Layout) -> None:
        process = self.train(run, layout)
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"the run did not end well ({process.returncode}):\n{output}")

    def kill_once(self, layout: Layout) -> bool:
        """Start, and kill a rank at a random moment; False if the run was over before."""
        attempts = number_of_attempts(self.run)
        process = self.train(self.run, layout)
        moment = self.draw.choices(list(MOMENTS), list(MOMENTS.values()))[0]
        is_there = {
            "start": self._after(self.draw.uniform(0, 10)),
            "step": self._steps_from_now(self.draw.randrange(1, 6)),
            "checkpoint": self._checkpoint_is_half,
        }[moment]
        while process.poll() is None and not (
            number_of_attempts(self.run) > attempts and is_there()
        ):
            time.sleep(POLL_S)
        if process.poll() is None:
            os.kill(self.draw.choice(rank_pids(self.run)), signal.SIGKILL)
        output, _ = process.communicate()
        if process.returncode == 0:
            return False
        if "killed by signal 9" not in output:
            raise SystemExit(f"a run did not end as one that lost a rank:\n{output}")
        self.moments[moment] += 1
        for step in saved_steps(self.checkpoints):
            check_alone(checkpoint_in(self.checkpoints, step))
        return True

    def _after(self, seconds: float) -> Callable[[], bool]:
        deadline = time.monotonic() + seconds
        return lambda: time.monotonic() > deadline

    def _steps_from_now(self, steps: int) -> Callable[[], bool]:
        seen: set[int] = set()

        def are_done() -> bool:
            newest = last_step(self.run)
            seen.add(newest)
            return len(seen) > steps

        return are_done

    def _checkpoint_is_half(self) -> bool:
        ours = f"attempt-{number_of_attempts(self.run):04d}-*"
        # Folders come and go.
        with suppress(FileNotFoundError):
            return any(
                not (folder / "manifest.json").exists() and any(folder.glob(ours))
                for folder in self.run.checkpoints.glob("step-*")
            )
        return False


def number_of_attempts(run: RunDirectory) -> int:
    """Of those whose ranks are there."""
    return len(list(run.attempts.glob("*/pids.json")))


def last_step(run: RunDirectory) -> int:
    try:
        lines = run.metrics.read_bytes().splitlines()
        return int(json.loads(lines[-1])["train/step"])
    except (FileNotFoundError, IndexError, ValueError):
        return 0


def losses(run: RunDirectory) -> list[float]:
    return [json.loads(line)["train/loss"] for line in run.metrics.read_text().splitlines()]


def is_audited(run: RunDirectory) -> bool:
    command = [sys.executable, "-m", "launch.cli", "audit", str(run.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr)
    return done.returncode == 0


def survive(folder: Path, kills: int, seed: int, layouts: tuple[Layout, ...]) -> bool:
    """Kill a run so often; print what became of it. Returns whether nothing was lost."""
    draw, is_same = random.Random(seed), len(layouts) == 1
    steps = STEPS_PER_KILL * kills
    chaos = Chaos(folder, steps, draw, *(() if is_same else DENSE))
    killed = 0
    while killed < kills and chaos.kill_once(draw.choice(layouts)):
        killed += 1
    chaos.finish(chaos.run, layouts[0])
    chaos.finish(chaos.whole, layouts[0])
    ours, expected = losses(chaos.run), losses(chaos.whole)
    error = max(abs(a - b) / abs(b) for a, b in zip(ours, expected, strict=True))
    is_exact = is_audited(chaos.run)
    moments = ", ".join(f"{count} at a {moment}" for moment, count in chaos.moments.items())
    cells = (
        "the same" if is_same else "changing",
        f"{killed} ({moments})",
        steps,
        "exact" if is_exact else "NOT exact",
        "bitwise" if error == 0 else f"{error:.1e}",
    )
    print("|", " | ".join(map(str, cells)), "|", flush=True)
    return is_exact and killed == kills and error <= (0 if is_same else TOLERANCE)


def measure_goodput(folder: Path, kills: int) -> bool:
    """Lose a rank every 30 steps, and go on without anybody's help."""
    steps = KILL_EVERY * (kills + 1)
    run = RunDirectory(folder / "goodput")
    command = (sys.executable, "-m", "launch.cli", "train", "tiny-hybrid-moe")
    settings = (*SETTINGS, f"train.steps={steps}", "data.seq_len=1024", "train.dtype=float32")
    often = f"checkpoint.every={GOODPUT_STEPS_BETWEEN_CHECKPOINTS}"
    began = time.monotonic()
    log = folder / "goodput.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--run-dir", str(run.root), "--max-restarts", "3", *SAME, *settings, often],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    starts, first_steps, draw = [began], [], random.Random(1)
    for kill in range(1, kills + 2):
        attempts = len(starts)
        while number_of_attempts(run) < attempts or not has_stepped(run, attempts):
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


def has_stepped(run: RunDirectory, attempt: int) -> bool:
    log = run.folder_of(attempt) / "rank-0.log"
    return log.is_file() and "\nstep " in log.read_text()


def check_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        raise SystemExit(f"the run ended too early:\n{log.read_text()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--goodput-kills", type=int, default=6)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    results = []
    try:
        if options.kills:
            print("| layouts | kills | steps | ledger | losses |\n|---|---|---:|---|---|")
            half = options.kills // 2
            for name, kills, layouts in (
                ("same", options.kills - half, (SAME,)),
                ("changing", half, LAYOUTS),
            ):
                if kills:
                    (folder / name).mkdir()
                    results.append(survive(folder / name, kills, options.seed, layouts))
        if options.goodput_kills:
            results.append(measure_goodput(folder, options.goodput_kills))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
