"""A model in megatron-core's distributed checkpoints (`torch_dist`), saved and loaded.

They are cut by their own names and shapes, not by ranks: what one layout has saved another loads.
So on one rank, `load_model` and `MegatronEngine.weights` turn such a checkpoint into weights of
ours, and `load_weights` and `save_model` ours into such a checkpoint.
"""

import re
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from pretrain.checkpoint.formats.weights import refuse_other_shapes
from pretrain.engines.megatron.cpu import on_any_device
from pretrain.engines.megatron.engine import MegatronEngine
from pretrain.errors import UserError

SHOWN = 5
# Optimizers, generators and the state of layers in fp8 are named otherwise.
OF_A_MODEL = re.compile(r"(embedding|decoder|output_layer)\..*(?<!_extra_state)$")


@on_any_device()
def save_model(engine: MegatronEngine, directory: Path) -> None:
    """Save the weights into a folder that is empty or not there. Collective."""
    directory.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(_sharded(engine, numbered=True), str(directory))


@on_any_device()
def load_model(engine: MegatronEngine, directory: Path) -> None:
    """Load the weights of a checkpoint that any layout has saved, ours or a megatron-core user's.

    Collective.

    Raises:
        UserError: it is no such checkpoint, or of another model; names what differs.
    """
    if not (directory / "metadata.json").is_file():
        raise UserError(
            f"{directory}: no metadata.json; a distributed checkpoint of megatron-core has one, "
            "for each step a folder iter_0000100 or the like"
        )
    found = dist_checkpointing.load_tensors_metadata(str(directory))
    # Where all layers are alike it stacks them, and their number is an offset instead of a name.
    numbered = any(re.match(r"decoder\.layers\.\d+\.", key) for key in found)
    sharded = _sharded(engine, numbered)
    _check(sharded, found, directory)
    loaded = dist_checkpointing.load(sharded, str(directory))
    for number, gpt in enumerate(engine.models):
        gpt.load_state_dict(loaded[f"model{number}"])
    engine.optimizer.reload_model_params()


def _sharded(engine: MegatronEngine, numbered: bool) -> dict[str, Any]:
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "non_homogeneous_layers": numbered,
    }
    return {
        f"model{number}": gpt.sharded_state_dict(metadata=metadata)
        for number, gpt in enumerate(engine.models)
    }


def _check(sharded: dict[str, Any], found: dict[str, Any], directory: Path) -> None:
    tensors = [
        tensor
        for of_model in sharded.values()
        for tensor in of_model.values()
        if isinstance(tensor, ShardedTensor | ShardedTensorFactory)
    ]
    # megatron-core itself would cut an embedding that is larger, and pad one that is smaller.
    parts = (
        part
        for tensor in tensors
        for part in nested_values(tensor.build() if _is_factory(tensor) else [tensor])
    )
    stored = {
        key: tuple(tensor.global_shape) for key, tensor in found.items() if OF_A_MODEL.match(key)
    }
    mine = {x.key for x in tensors}, {x.key: tuple(x.global_shape) for x in parts}
    # Stages of a pipeline have different ones.
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    missing = sorted({key for keys, _ in of_ranks for key in keys} - found.keys())
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} tensors of this model are not there, "
            f"{', '.join(missing[:SHOWN])} among them; it is a checkpoint of another model"
        )
    wanted = {key: shape for _, shapes in of_ranks for key, shape in shapes.items()}
    refuse_other_shapes(directory, stored, wanted)


def _is_factory(tensor: ShardedTensor | ShardedTensorFactory) -> bool:
    return isinstance(tensor, ShardedTensorFactory)
