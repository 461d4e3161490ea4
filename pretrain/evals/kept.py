"""Where evaluations are kept."""

from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory
from pretrain.scratch import make_writable


def make_room(run: RunDirectory) -> None:
    """Make the folder of a run's evaluations, before one of them takes its time.

    Raises:
        UserError: what is found could not be kept there.
    """
    try:
        make_writable(run.evaluations)
    except OSError as error:
        raise UserError(
            f"{run.evaluations} cannot be written, where evaluations are kept: {error.strerror}. "
            "Make room, or make it writable; or evaluate a copy of the run directory"
        ) from None
