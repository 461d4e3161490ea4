"""Whether two configurations are of one model, and which settings would make them so."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from pretrain.errors import UserError
from pretrain.model.config import ModelConfig

# What changes the training of a model, or its first weights, and nothing that it computes.
_OF_TRAINING = {
    "init_std",
    "moe.aux_loss",
    "moe.balance",
    "moe.bias_rate",
    "moe.z_loss",
    "moe.capacity_factor",
}


def refuse_another_model(source: object, found: ModelConfig, wanted: ModelConfig) -> None:
    """Raise UserError, with the settings that fit, unless both models compute the same.

    Args:
        source: what `found` is the model of.
        wanted: the recipe's.
    """
    lines = [
        f"model.{name}={_as_override(_value(found, name))}  "
        f"(the recipe has {_as_override(_value(wanted, name))})"
        for name in _decisive(found)
        if _meaning(found, name) != _meaning(wanted, name)
    ]
    if lines:
        raise UserError(
            f"{source} is of another model than the recipe's. These settings fit it:\n  "
            + "\n  ".join(lines)
            + "\nOnce it is imported, what leaves the weights as they are, such as "
            "model.attention.rope_base, may change: farspan train ... --allow-change SETTING"
        )


def _decisive(model: ModelConfig) -> Iterator[str]:
    """The settings that decide what a model computes; others have no use in it."""
    kinds, has_experts = set(model.layer_kinds()), model.moe.n_experts > 0
    unused = {
        "d_ff": has_experts,
        "linear.": "linear" not in kinds,
        "attention.": kinds == {"linear"},
        "attention.window": "sliding" not in kinds,
        "moe.": not has_experts,
    }
    # Of a RoPE that is left as it is.
    yarn = ("original_length", "beta_fast", "beta_slow", "whole_pairs")
    unused |= {f"attention.yarn.{name}": model.attention.yarn.factor == 1 for name in yarn}
    for name in _names(model):
        is_unused = any(is_so and name.startswith(prefix) for prefix, is_so in unused.items())
        if name == "moe.n_experts" or not (is_unused or name in _OF_TRAINING):
            yield name


def _names(section: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _names(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _value(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = getattr(model, part)
    return model


def _meaning(model: ModelConfig, name: str) -> Any:
    """Of a setting, such that there are no two ways of saying the same."""
    if name == "layer_pattern":
        return model.layer_kinds()
    if name == "attention.positions":
        return model.rotates()
    if name == "attention.yarn.attention_factor":
        return model.attention.yarn.scale_of_rotated()
    return _value(model, name)


def _as_override(value: Any) -> str:
    """As it is written in KEY=VALUE."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
