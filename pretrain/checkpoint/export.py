"""The newest checkpoint of a run as a folder that transformers loads."""

from pathlib import Path

from data_pipeline.stream import load_tokenizer
from pretrain.balancing import RouterState
from pretrain.checkpoint.hf import export
from pretrain.checkpoint.trained import load_newest
from pretrain.config import Config
from pretrain.run_dir import RunDirectory


def export_newest(run: RunDirectory, out: Path) -> tuple[int, Config]:
    """Write the newest whole checkpoint to `out`, in float32.

    Returns:
        Its step, and the configuration of the phase that it was trained in last.

    Raises:
        UserError: not a run directory, no checkpoint yet, or no family of transformers has the
            model.
    """
    step, config, model = load_newest(run)
    export(
        config.model,
        model.state_dict(),
        run.tokenizer,
        out,
        eos_id=load_tokenizer(run.tokenizer).eos_id,
        max_positions=config.data.seq_len,
        selection_bias=RouterState.selection_bias_of(dict(model.layers)),
    )
    return step, config
