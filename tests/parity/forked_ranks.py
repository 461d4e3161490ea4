"""Run cases on ranks that are forked from one process, which has imported everything once.

Reads a case per line of standard input and answers each with a line: null, or what went wrong.
Ranks of one case know nothing of another's: what a case breaks is broken for it alone.
"""

import gc
import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import torch._dynamo  # activation checkpointing imports it at its first use
import torch.distributed as dist
import torch.distributed.tensor.parallel

from launch.local import free_port, rank_environment
from parallel.mesh import join_ranks
from pretrain.config import load_config
from pretrain.data import open_stream
from tests.parity.case import Case
from tests.parity.train_case import train_case

TIMEOUT_S = 120


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _time_is_up)
    for number, line in enumerate(sys.stdin):
        case = Case(**json.loads(line))
        if number == 0:
            _load_compiled_loops(case)
            gc.freeze()  # no rank looks for garbage in what all of them share
        print(json.dumps(_run(case)), flush=True)


def _load_compiled_loops(case: Case) -> None:
    """Read a row: to load numba would be a third of what a rank computes in a few steps."""
    config = load_config("tiny-hybrid-moe", [*case.overrides, f"train.steps={case.steps}"])
    stream = open_stream(config)
    stream.read(stream.next_batch(1), [0])


def _run(case: Case) -> str | None:
    """Run `case` on its ranks; the output of the one that failed, if one did."""
    port = free_port()
    ranks = {_fork(case, rank, port): rank for rank in range(case.ranks)}
    signal.alarm(TIMEOUT_S)
    try:
        while ranks:
            pid, status = os.wait()
            rank = ranks.pop(pid)
            if status:
                return f"rank {rank} of {case.ranks} failed:\n{_log(case, rank).read_text()}"
        return None
    except TimeoutError:
        return f"ranks {sorted(ranks.values())} of {case.ranks} did not finish in {TIMEOUT_S} s"
    finally:
        signal.alarm(0)
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _time_is_up(signum: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError


def _log(case: Case, rank: int) -> Path:
    return Path(case.results) / f"rank-{rank}.log"


def _fork(case: Case, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    exit_code = 1
    try:
        signal.alarm(0)
        with _log(case, rank).open("w") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
        os.environ |= rank_environment(rank, case.ranks, port)
        device = join_ranks(timedelta(seconds=TIMEOUT_S))
        torch.save(train_case(case, device), Path(case.results) / f"rank-{rank}.pt")
        dist.destroy_process_group()
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(exit_code)


if __name__ == "__main__":
    main()
