"""`farspan import`: a run that begins with the weights of others."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.environment import use_no_gpu
from launch.prepare import prepare_run, with_absolute_paths
from launch.train import directory_of
from pretrain.config import load_config
from pretrain.errors import TrainingError, UserError
from pretrain.parallel_config import fewest_ranks
from pretrain.run_dir import RunDirectory


def import_weights(
    source: Path, form: str | None, recipe: str, overrides: Sequence[str], run_dir: Path | None
) -> None:
    """Make a run directory whose checkpoint of step 0 has the weights of `source`.

    Args:
        form: the format of `source`; None looks.

    Raises:
        UserError, DataError: `source` is not known, or of another model or tokenizer than the
            recipe's; or the run has begun, or cannot be made. Nothing has been changed then.
    """
    use_no_gpu()
    from parallel.mesh import alone
    from pretrain.checkpoint.beginning import refuse_begun, save_beginning
    from pretrain.checkpoint.formats import FORMATS, format_of
    from pretrain.data import stream_of

    config = load_config(recipe, overrides)
    run = RunDirectory(directory_of(config, recipe, run_dir).resolve())
    config = with_absolute_paths(config, run)
    refuse_begun(config, run)
    name = format_of(source, form)
    _refuse_another_tokenizer(source / "tokenizer.json", stream_of(config).tokenizer)
    with alone():
        weights = FORMATS[name].read(source, config)
        imported = {"source": str(source.resolve()), "format": name}
        run = prepare_run(config, run.root, imported=imported)
        try:
            with run.launching(), run.exclusive():
                refuse_begun(config, run)
                save_beginning(config, run, weights)
        except OSError as error:
            if run.is_cause_of(error):
                raise TrainingError(run.explain(error)) from None
            raise
    print(f"the run {run.root} begins with the weights of {source} ({name})")
    train = ["farspan", "train", recipe, *overrides, "--run-dir", str(run.root)]
    if (ranks := fewest_ranks(config.parallel)) > 1:
        train += ["--nproc", str(ranks)]
    print(f"go on with: {shlex.join(train)}")


def _refuse_another_tokenizer(theirs: Path, ours: Path) -> None:
    """Raise UserError if a token has another number than in the shards."""
    from tokenizers import Tokenizer

    if not theirs.is_file():
        return
    their, our = (
        Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True) for path in (theirs, ours)
    )
    differ = sorted(
        token for token in their.keys() | our.keys() if their.get(token) != our.get(token)
    )
    if differ:
        first = differ[0]
        raise UserError(
            f"{theirs} is another tokenizer than that of data.shards: {first!r} is the token "
            f"{their.get(first)} there and {our.get(first)} in the shards, one of {len(differ)} "
            f"that differ. Make shards with it: farspan data run ... --tokenizer {theirs}"
        )
