"""Run scripts on ranks that are forked from one process, which has imported everything once.

Reads a launch per line of standard input, and answers each with a line: null, or which rank failed
first and what it printed. Ranks of one launch know nothing of another's: what a script changes is
changed for it alone.
"""

import gc
import json
import os
import runpy
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NoReturn

import numpy as np
import torch
import torch._dynamo  # activation checkpointing imports it at its first use
import torch.distributed.tensor.parallel

import pretrain.train  # noqa: F401  what nearly every script needs
from data_pipeline.kernels.permutation import mix64
from launch.local import free_port, rank_environment


@dataclass
class Launch:
    """A script, to be run on ranks.

    Attributes:
        timeout_s: after which those ranks that have not ended are killed.
    """

    nproc: int
    script: str
    arguments: list[str]
    environment: dict[str, str]
    timeout_s: int


def main() -> None:
    torch.set_num_threads(1)
    _run_in_batch()
    mix64(np.uint64(0))  # numba takes 0.4 s for the first compiled loop, and nothing for others
    gc.freeze()  # no rank looks for garbage in what all of them share
    signal.signal(signal.SIGALRM, _time_is_up)
    for line in sys.stdin:
        with TemporaryDirectory() as logs:
            problem = _run(Launch(**json.loads(line)), Path(logs))
        print(json.dumps(problem), flush=True)


def _run_in_batch() -> None:
    """Let this process, and ranks that are forked from it, wait until others have had their turn.

    Where several share a core each message would stop the rank that computes: 89 s for layouts that
    take 80 so.
    """
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _run(launch: Launch, logs: Path) -> str | None:
    """Wait until all ranks have ended; the output of the one that failed first, if one did."""
    port = free_port()
    ranks = {_fork(launch, rank, port, logs / f"{rank}"): rank for rank in range(launch.nproc)}
    problem = None
    signal.alarm(launch.timeout_s)
    try:
        while ranks:
            pid, status = os.wait()
            rank = ranks.pop(pid)
            if status and problem is None:
                output = (logs / f"{rank}").read_text(errors="replace")
                code = os.waitstatus_to_exitcode(status)
                how = "" if code > 0 else f", killed by signal {-code}"
                problem = f"rank {rank} of {launch.nproc} failed{how}:\n{output}"
    except TimeoutError:
        late = f"ranks {sorted(ranks.values())} of {launch.nproc} did not end"
        problem = problem or f"{late} in {launch.timeout_s} s"
    finally:
        signal.alarm(0)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return problem


def _time_is_up(signum: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError


def _fork(launch: Launch, rank: int, port: int, log: Path) -> int:
    log.touch()
    if pid := os.fork():
        return pid
    exit_code = 1
    try:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        _redirect(log)
        os.environ.clear()
        os.environ |= launch.environment | rank_environment(rank, launch.nproc, port)
        sys.argv = [launch.script, *launch.arguments]
        runpy.run_path(launch.script, run_name="__main__")
        exit_code = 0
    except SystemExit as error:
        exit_code = _exit_code(error)
    except BaseException:
        traceback.print_exc()
    finally:
        # At once: gloo's threads may still free tensors, and would abort a process whose
        # interpreter ends meanwhile.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _redirect(log: Path) -> None:
    """Nothing to read, and all that is written to `log`."""
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
