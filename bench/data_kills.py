"""Kill a data run again and again, and prove that its output is the one nobody disturbed.

    python -m bench.data_kills [--kills 50] [--seed 0]

`farspan data run` cleans a crawl that is made here, with one worker or two. All of its processes
are killed (SIGKILL) at a random moment, and the same command is started again, with one worker or
two, until no kills are left; a run that comes to its end meanwhile is compared, byte by byte,
with one that was not killed, but for its metrics, which tell the times, and another one begins.
Exit code 1: a byte differed.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.rates import METRICS
from data_pipeline.sample import make_sample_crawl

OPTIONS = ("--recipe", "demo", "--vocab-size", "600")
STAGES = ("inputs", "clean", "dedup", "tokenizer", "shards")


@dataclass(frozen=True)
class Killed:
    """
    Attributes:
        moments: kills by the stage that had been reported last; `start` before any.
        runs: that were compared.
        differing: files that were not, byte for byte, those of a run that nobody killed.
    """

    moments: Counter[str]
    runs: int
    differing: list[str]


def command(inputs: Sequence[Path], out: Path, workers: int) -> list[str]:
    program = [sys.executable, "-m", "launch.cli", "data", "run", *map(str, inputs)]
    return [*program, "--out", str(out), "--workers", str(workers), *OPTIONS]


def files(out: Path) -> dict[str, bytes]:
    paths = [path for path in out.rglob("*") if path.is_file() and path != out / METRICS]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def kill_runs(folder: Path, kills: int, seed: int) -> Killed:
    """Kill runs in `folder`, which is empty, and compare each that comes to its end."""
    draw = random.Random(seed)
    inputs = make_sample_crawl(folder / "crawl", pages=120, files=4, seed=seed).files
    # Compiled code is cached by the first run; the second tells how long one takes.
    for name in ("warm", "undisturbed"):
        began = time.monotonic()
        subprocess.run(command(inputs, folder / name, 1), check=True, stdout=subprocess.DEVNULL)
    whole, expected = time.monotonic() - began, files(folder / "undisturbed")
    moments: Counter[str] = Counter()
    differing: list[str] = []
    runs = left = 0
    while left < kills or not runs or (folder / f"run-{runs}").exists():
        out = folder / f"run-{runs}"
        patience = draw.uniform(0, 1.2 * whole) if left < kills else None
        stage = _run(command(inputs, out, draw.choice((1, 2))), folder / "log", patience)
        if stage is not None:
            moments[stage] += 1
            left += 1
            continue
        found = files(out)
        names = sorted(found.keys() | expected.keys())
        differing += [f"{out}/{name}" for name in names if found.get(name) != expected.get(name)]
        runs += 1
    return Killed(moments, runs, differing)


def _run(program: Sequence[str], log: Path, patience_s: float | None) -> str | None:
    """The stage in which a run was killed; None if it came to its end in time."""
    with log.open("w") as printed:
        process = subprocess.Popen(program, stdout=printed, stderr=printed, start_new_session=True)
        try:
            code = process.wait(patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            told = [line.partition(":")[0] for line in log.read_text().splitlines()]
            return next((name for name in reversed(told) if name in STAGES), "start")
    assert code == 0, log.read_text()
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        killed = kill_runs(Path(folder), arguments.kills, arguments.seed)
    where = ", ".join(f"{count} in {stage}" for stage, count in killed.moments.most_common())
    print(f"{killed.moments.total()} kills ({where}); {killed.runs} runs came to their end")
    print("\n".join(killed.differing) or "all their files are those of a run that nobody killed")
    return 1 if killed.differing else 0


if __name__ == "__main__":
    sys.exit(main())
