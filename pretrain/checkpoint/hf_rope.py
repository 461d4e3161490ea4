"""RoPE as configurations of transformers have it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pretrain.errors import UserError
from pretrain.model.config import AttentionConfig, YarnConfig

# What their field is called, and ours.
_YARN_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "whole_pairs",
}


def rope_to_hf(attention: AttentionConfig) -> dict[str, Any]:
    """The fields of `config.json` that transformers 5 reads, and those that 4 reads.

    With YaRN, max_position_embeddings too: up to 4.55 transformers takes its ratio to the original
    length for the factor.
    """
    base = {"rope_theta": attention.rope_base, "partial_rotary_factor": attention.rope_fraction}
    yarn, scale = attention.yarn, attention.yarn.scale_of_rotated()
    if yarn.factor == scale == 1:
        return {"rope_parameters": {"rope_type": "default", **base}, **base}
    fields = {theirs: getattr(yarn, ours) for theirs, ours in _YARN_FIELDS.items()}
    fields |= {"rope_type": "yarn", "attention_factor": scale}
    if scale != (usual := replace(yarn, attention_factor=None).scale_of_rotated()):
        # vLLM before 0.30 ignores attention_factor, and multiplies the usual one by this.
        fields["attn_factor"] = scale / usual
    return {
        "rope_parameters": fields | base,
        "rope_scaling": fields,
        "max_position_embeddings": round(yarn.factor * yarn.original_length),
        **base,
    }


def yarn_from_hf(rope: Mapping[str, Any], max_positions: int) -> YarnConfig:
    """The scaling that `rope_parameters` ask for.

    Args:
        max_positions: max_position_embeddings, by which transformers finds a factor that is null.

    Raises:
        UserError: it is one that `Transformer` lacks.
    """
    kind = rope["rope_type"]
    if kind == "default":
        return YarnConfig()
    if kind != "yarn":
        raise UserError(
            f"config.json: rope_type = {kind!r} is not supported, only 'default' and 'yarn'"
        )
    values = {
        ours: rope[theirs] for theirs, ours in _YARN_FIELDS.items() if rope.get(theirs) is not None
    }
    values.setdefault("factor", max_positions / values["original_length"])
    if values["factor"] < 1:
        raise UserError(f"config.json: factor = {values['factor']} of yarn: must be 1 or more")
    scale, scale_of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if "attention_factor" not in values and scale and scale_of_all:
        factor = values["factor"]
        values["attention_factor"] = _mscale(factor, scale) / _mscale(factor, scale_of_all)
    return YarnConfig(**values)


def _mscale(factor: float, weight: float) -> float:
    """As DeepSeek-V2's configurations mean it (arXiv:2405.04434)."""
    return 0.1 * weight * math.log(factor) + 1
