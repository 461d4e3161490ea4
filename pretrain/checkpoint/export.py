"""The newest checkpoint of a run in a format of others."""

from pathlib import Path

from pretrain.balancing import RouterState
from pretrain.checkpoint.formats import Write
from pretrain.checkpoint.formats.hf import write as write_hf
from pretrain.checkpoint.formats.weights import Weights
from pretrain.checkpoint.trained import load_newest, require_checkpoint
from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.run_dir import RunDirectory
from pretrain.scratch import make_writable, scratch_folder


def export_newest(run: RunDirectory, out: Path, write: Write = write_hf) -> tuple[int, Config]:
    """Write the newest whole checkpoint to `out`, in float32; a folder that is whole or absent.

    Args:
        write: of one of `formats.FORMATS`.

    Returns:
        Its step, and the configuration of the phase that it was trained in last.

    Raises:
        UserError: not a run directory, no checkpoint yet, `out` is not empty, cannot be there or
            has no room, or the format does not have the model.
    """
    require_checkpoint(run)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there and not empty; name another folder, or remove it")
    out = out.resolve()
    try:
        make_writable(out.parent)
    except OSError as error:
        raise UserError(
            f"--out {out}: nothing can be written there ({error.strerror}); name another place"
        ) from None
    step, config, model = load_newest(run)
    bias = RouterState.selection_bias_of(dict(model.layers))
    try:
        with scratch_folder(out) as aside:
            write(config, Weights(model.state_dict(), bias), run.tokenizer, aside)
            aside.rename(out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error}; nothing is left of it. Make room "
            "there, or name another place"
        ) from error
    return step, config
