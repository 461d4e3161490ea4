"""A model's whole weights, and whether they are those of a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Transformer

SHOWN = 4

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Weights:
    """
    Attributes:
        state: whole, under the names of `Transformer`, on the CPU.
        selection_bias: [L, E] of the routers; None is zero.
    """

    state: dict[str, Tensor]
    selection_bias: Tensor | None = None


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of each weight."""
    with torch.device("meta"):
        empty = Transformer(model).state_dict()
    return {name: tuple(weight.shape) for name, weight in empty.items()}


def refuse_other_shapes(source: object, found: Shapes, wanted: Shapes) -> None:
    """Raise UserError, naming what differs, unless the tensors of `source` are those of the model.

    Args:
        found, wanted: by one name or the other of a tensor.
    """
    problems = [
        *(f"{name} is not there" for name in sorted(wanted.keys() - found.keys())),
        *(
            f"{name} is there, and not in the model"
            for name in sorted(found.keys() - wanted.keys())
        ),
        *(
            f"{name} is {list(found[name])} there, {list(shape)} in the model"
            for name, shape in sorted(wanted.items())
            if name in found and found[name] != shape
        ),
    ]
    if problems:
        rest = len(problems) - SHOWN
        more = f"\n  and {rest} more" if rest > 0 else ""
        raise UserError(
            f"{source} has the weights of another model than the recipe's:\n  "
            + "\n  ".join(problems[:SHOWN])
            + f"{more}\nChange the settings of model that give these shapes"
        )
