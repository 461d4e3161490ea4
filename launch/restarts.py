"""How far a run has come, on which it depends whether another restart is worth it."""

from contextlib import suppress

from pretrain.config import read_run_config
from pretrain.errors import AttemptError, UserError
from pretrain.metrics.sinks import last_step
from pretrain.run_dir import RunDirectory


def furthest_step(run: RunDirectory) -> int:
    """The last step that is logged or saved, 0 before the first."""
    # Half a second that the ranks need not wait for.
    from pretrain.checkpoint.store import saved_steps
    from pretrain.checkpoint.trained import checkpoints_of

    steps = [0]
    # What cannot be read now is no reason to give the run up.
    with suppress(OSError, UserError, AttemptError):
        steps += saved_steps(checkpoints_of(read_run_config(run), run))
    with suppress(OSError, UserError):
        steps.append(last_step(run.metrics))
    return max(steps)
