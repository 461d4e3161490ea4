"""Whether a batch job whose run is not done is worth another start:
`python -m launch.requeue RUN_DIR JOB MAX_REQUEUES`.

The same rule as on one machine (launch.agent): a run that was asked to stop goes on, and so does
one that fails, until MAX_REQUEUES starts of a job in a row have come no further than those before.

Args:
    JOB: what all starts of the job have in common; another one begins to count anew.

Exit codes: 0 start it again, 1 give it up.
"""

import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.failures import furthest_step
from pretrain.run_dir import RunDirectory, write_atomically


@dataclass(frozen=True)
class Requeues:
    """What is known of a job when it has ended.

    Attributes:
        count: how often in a row it has been requeued after a failure without progress.
        furthest: the step to which the run had come.
        attempt: the number of its newest attempt.
    """

    job: str
    count: int
    furthest: int
    attempt: int


def is_worth_requeueing(run: RunDirectory, job: str, at_most: int) -> bool:
    """Decide, say why, and keep the count in the run directory."""
    before = _read(run, job)
    furthest, attempt = furthest_step(run), run.current_attempt()
    # A marker of an earlier attempt tells nothing of a start that began none.
    if run.stopped.exists() and attempt > before.attempt:
        count = 0
        print("requeued: it was asked to stop, and everything is saved", flush=True)
    elif furthest > before.furthest >= 0:
        count = 1
        print(f"requeued: it has failed, after step {furthest}", flush=True)
    else:
        count = before.count + 1
        if count > at_most:
            print(
                f"gave up: {at_most} requeues did not get beyond step {furthest}. The logs of all "
                f"attempts: {run.attempts}. Once the cause is mended, submit the same line again: "
                "it goes on from the newest checkpoint",
                file=sys.stderr,
            )
            return False
        print(f"requeued: it has failed, {count} of {at_most} times without progress", flush=True)
    write_atomically(run.requeues, json.dumps(asdict(Requeues(job, count, furthest, attempt))))
    return True


def _read(run: RunDirectory, job: str) -> Requeues:
    # A file that cannot be read, or of another job, is as good as none.
    with suppress(OSError, ValueError, TypeError):
        requeues = Requeues(**json.loads(run.requeues.read_text()))
        if requeues.job == job:
            return requeues
    return Requeues(job, count=0, furthest=-1, attempt=0)


if __name__ == "__main__":
    root, job, at_most = sys.argv[1:]
    sys.exit(0 if is_worth_requeueing(RunDirectory(Path(root)), job, int(at_most)) else 1)
