"""Where evaluations are kept."""

from tempfile import TemporaryFile

from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory


def make_room(run: RunDirectory) -> None:
    """Make the folder of a run's evaluations, before one of them takes its time.

    Raises:
        UserError: what is found could not be kept there.
    """
    try:
        run.evaluations.mkdir(exist_ok=True)
        with TemporaryFile(dir=run.evaluations):
            pass
    except OSError as error:
        raise UserError(
            f"{run.evaluations} cannot be written, where evaluations are kept: {error.strerror}. "
            "Make room, or make it writable; or evaluate a copy of the run directory"
        ) from None
