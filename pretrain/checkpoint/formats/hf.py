"""A folder of transformers: config.json, safetensors and a tokenizer."""

from pathlib import Path

from data_pipeline.stream import load_tokenizer
from pretrain.checkpoint import hf
from pretrain.checkpoint.formats.same_model import refuse_another_model
from pretrain.checkpoint.formats.weights import Weights, refuse_other_shapes, shapes_of
from pretrain.config import Config

KNOWN_BY = "config.json and *.safetensors"


def is_in(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def read(folder: Path, config: Config) -> Weights:
    """Its weights in the type that they are stored in."""
    # Before gigabytes are read.
    found = hf.load_config(folder)
    refuse_another_model(folder / "config.json", found, config.model)
    _, state = hf.load(folder)
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    refuse_other_shapes(folder, shapes, shapes_of(config.model))
    return Weights(state)


def write(config: Config, weights: Weights, tokenizer: Path, out: Path) -> None:
    hf.export(
        config.model,
        weights.state,
        tokenizer,
        out,
        eos_id=load_tokenizer(tokenizer).eos_id,
        max_positions=config.data.seq_len,
        selection_bias=weights.selection_bias,
    )
