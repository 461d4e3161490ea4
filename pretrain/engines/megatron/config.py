"""From farspan's configuration to megatron-core's."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from pretrain.config import Config
from pretrain.engines.limits import stages_of_rank
from pretrain.layouts import Layout
from pretrain.model.config import ModelConfig


def transformer_config(config: Config, layout: Layout) -> TransformerConfig:
    """megatron-core's settings of a model and its layout."""
    model, dtype = config.model, getattr(torch, config.train.dtype)
    return TransformerConfig(
        num_layers=model.n_layers,
        hidden_size=model.d_model,
        ffn_hidden_size=model.d_ff,
        layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=model.zero_centered_norm,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0,
        attention_dropout=0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The sum over tokens, divided by their number in the global batch.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # The weights come from elsewhere.
        perform_initialization=False,
        deterministic_mode=config.train.deterministic,
        use_cpu_initialization=not torch.cuda.is_available(),
        **_attention(model, layout),
        **(_experts(model, layout) if model.moe.n_experts else {}),
        **_parallel(config, layout),
    )


def _attention(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    c, linear, kinds = model.attention, model.linear, model.layer_kinds()
    # Of heads that no layer has, it asks nevertheless that the ranks of tp can share them.
    has_heads = set(kinds) != {"linear"}
    fields: dict[str, Any] = {
        "num_attention_heads": c.n_heads if has_heads else layout.tp,
        "num_query_groups": c.n_kv_heads if has_heads else layout.tp,
        "kv_channels": c.head_dim,
        "qk_layernorm": True,
        "attention_output_gate": c.output_gate,
        "linear_num_key_heads": linear.n_key_heads,
        "linear_num_value_heads": linear.n_value_heads,
        "linear_key_head_dim": linear.key_dim,
        "linear_value_head_dim": linear.value_dim,
        "linear_conv_kernel_dim": linear.conv_width,
    }
    if "sliding" in kinds:
        fields["window_size"] = (c.window - 1, 0)
        fields["window_attn_skip_freq"] = [int(kind == "sliding") for kind in kinds]
    return fields


def _experts(model: ModelConfig, layout: Layout) -> dict[str, Any]:
    moe = model.moe
    return {
        "num_moe_experts": moe.n_experts,
        "moe_router_topk": moe.top_k,
        "moe_router_pre_softmax": True,
        "moe_ffn_hidden_size": moe.d_expert,
        "moe_shared_expert_intermediate_size": moe.d_shared_expert or None,
        "moe_shared_expert_gate": moe.d_shared_expert > 0,
        # Our router has its own losses.
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": HAVE_TE,
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": 1,
    }


def _parallel(config: Config, layout: Layout) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.tp > 1,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "batch_p2p_sync": False,
    }
    if (stages := stages_of_rank(config, layout)) > 1:
        # Without overlap gloo takes one stage's tensors for another's: wrong, and silent.
        fields |= {
            "virtual_pipeline_model_parallel_size": stages,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    if config.parallel.recompute == "full":
        fields |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return fields


def optimizer_config(config: Config) -> OptimizerConfig:
    """megatron-core's AdamW, with our settings."""
    optim, dtype = config.optim, getattr(torch, config.train.dtype)
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip or 0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
