"""farspan's layers in megatron-core's layer specs."""

import copy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from pretrain.engines.megatron.attention import RingAttention, Rope
from pretrain.engines.megatron.gated_delta import GatedDeltaNet
from pretrain.engines.megatron.norm import Norm
from pretrain.engines.megatron.router import Router
from pretrain.errors import UserError
from pretrain.model.config import ModelConfig


def with_ring_attention(spec: Any, rope: Rope | None = None) -> Any:
    """A copy of a spec whose self-attention is farspan's at the core.

    Args:
        spec: of a layer, or of a block of layers, with Transformer Engine or without.
        rope: see `RingAttention`.

    Raises:
        UserError: there is no self-attention with a core in it.
    """
    spec = copy.deepcopy(spec)
    layers = spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]
    for layer in layers:
        attention: Any = getattr(layer.submodules.self_attention, "submodules", None)
        if not hasattr(attention, "core_attention"):
            raise UserError(
                f"a layer whose self_attention is {layer.submodules.self_attention} has no "
                "core_attention to replace; leave it out"
            )
        attention.core_attention = ModuleSpec(module=RingAttention, params={"rope": rope})
    return spec


def with_gated_delta_net(layer: ModuleSpec) -> ModuleSpec:
    """A copy of a layer's spec with farspan's gated delta net in place of attention."""
    layer = copy.deepcopy(layer)
    layer.submodules.self_attention = ModuleSpec(module=GatedDeltaNet)
    # Transformer Engine has the norm in the projection that goes.
    if layer.submodules.input_layernorm is IdentityOp:
        layer.submodules.input_layernorm = _norm()
    # The keys of a checkpoint say where that norm would be.
    layer.submodules.sharded_state_dict_keys_map.pop("input_layernorm.", None)
    return layer


def block_spec(
    model: ModelConfig, config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of a model of ours on this stage of megatron-core's pipeline.

    Experts are megatron-core's, with its dispatchers and grouped products, which its users have
    tuned; the router is ours, whose balance loss does not depend on how a batch is cut.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(model, number) for number in layers], layer_norm=_norm()
    )


def _layer_spec(model: ModelConfig, number: int) -> ModuleSpec:
    layer = _their_layer(model.moe.n_experts or None)
    if model.moe.n_experts:
        router = ModuleSpec(module=Router, params={"moe": model.moe})
        layer.submodules.mlp.submodules.router = router
    if model.layer_kinds()[number] == "linear":
        return with_gated_delta_net(layer)
    attention = model.attention
    fraction = attention.rope_fraction if model.rotates()[number] else 0.0
    return with_ring_attention(layer, Rope(attention.rope_base, fraction, attention.yarn))


def _their_layer(n_experts: int | None) -> ModuleSpec:
    if HAVE_TE:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=n_experts, moe_grouped_gemm=True, qk_layernorm=True
        )
    layer = get_gpt_layer_local_spec(
        num_experts=n_experts, qk_layernorm=True, normalization="RMSNorm"
    )
    attention = layer.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = Norm
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    return layer


def _norm() -> Any:
    if HAVE_TE:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return Norm
