"""Layers of other projects with our weights."""

import transformers
from transformers.models.qwen3_next import modeling_qwen3_next

from pretrain.model.moe import MoE


def transformers_block(moe: MoE, d_model: int) -> modeling_qwen3_next.Qwen3NextSparseMoeBlock:
    """transformers' Qwen3-Next sparse block with `grouped_mm` experts and copies of our weights."""
    c = moe.config
    config = transformers.Qwen3NextConfig(
        hidden_size=d_model,
        num_experts=c.n_experts,
        num_experts_per_tok=c.top_k,
        moe_intermediate_size=c.d_expert,
        shared_expert_intermediate_size=c.d_shared_expert,
        norm_topk_prob=c.renormalise_top_k,
        experts_implementation="grouped_mm",
    )
    block = modeling_qwen3_next.Qwen3NextSparseMoeBlock(config)
    names = {
        "gate.weight": "router.weight",
        "experts.gate_up_proj": "experts.gate_up",
        "experts.down_proj": "experts.down",
        "shared_expert.gate_proj.weight": "shared_expert.gate.weight",
        "shared_expert.up_proj.weight": "shared_expert.up.weight",
        "shared_expert.down_proj.weight": "shared_expert.down.weight",
        "shared_expert_gate.weight": "shared_gate.weight",
    }
    block.load_state_dict({theirs: moe.state_dict()[ours] for theirs, ours in names.items()})
    return block
