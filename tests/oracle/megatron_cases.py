"""Loss and gradient of one global batch in megatron-core; run on N ranks by test_megatron.py.

Weights, batch and layout are those that the same overrides mean to farspan.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

from pretrain.config import Config
from pretrain.data import open_stream
from pretrain.engines.megatron import shard_batch, with_ring_attention
from pretrain.engines.megatron.cpu import on_any_device
from pretrain.engines.megatron.norm import Norm
from pretrain.engines.megatron.weights import fill, pieces, whole
from pretrain.model.init import initialize
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.model.transformer import Transformer
from tests.oracle.cases import Microbatch, read_microbatches, run_cases


def transformer_config(config: Config) -> TransformerConfig:
    model, parallel = config.model, config.parallel
    moe = model.moe
    experts: dict[str, Any] = {}
    if moe.n_experts:
        experts = {
            "num_moe_experts": moe.n_experts,
            "moe_router_topk": moe.top_k,
            "moe_ffn_hidden_size": moe.d_expert,
            # A softmax over the top k logits is the renormalised softmax over all.
            "moe_router_pre_softmax": False,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": parallel.ep,
            "expert_tensor_parallel_size": 1,
        }
    return TransformerConfig(
        num_layers=model.n_layers,
        hidden_size=model.d_model,
        ffn_hidden_size=model.d_ff,
        num_attention_heads=model.attention.n_heads,
        num_query_groups=model.attention.n_kv_heads,
        kv_channels=model.attention.head_dim,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0,
        attention_dropout=0,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.tp > 1,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        pipeline_dtype=torch.float32,
        batch_p2p_sync=False,
        # The sum over tokens, divided by their number in the global batch.
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        use_cpu_initialization=True,
        perform_initialization=False,
        **experts,
    )


def layer_specs(config: TransformerConfig) -> TransformerBlockSubmodules:
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    spec.layer_norm = Norm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = Norm
    # Without Transformer Engine its own attention refuses to share a sequence.
    return with_ring_attention(spec) if config.context_parallel_size > 1 else spec


def build_model(config: Config) -> DistributedDataParallel:
    """This rank's part of the GPTModel, with the weights that `config` starts from."""
    model, theirs = config.model, transformer_config(config)
    gpt = GPTModel(
        theirs,
        layer_specs(theirs),
        model.vocab_size,
        config.data.seq_len,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=int(model.attention.rope_base),
    )
    ours = Transformer(model)
    initialize(ours, model, config.train.seed)
    weights = ours.state_dict()
    fill(pieces(gpt, model), lambda piece: weights[piece.name][piece.region])
    return DistributedDataParallel(theirs, DistributedDataParallelConfig(), gpt)


def mask_of(position: Tensor) -> Tensor:
    """[B, 1, T, T] of positions [B, T], true where a token must not attend: what is later, or
    elsewhere.
    """
    document = (position == 0).cumsum(1)
    same = document[:, :, None] == document[:, None, :]
    return ~same.tril()[:, None]


def share_of_rank(batch: Microbatch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """This rank's tokens, and what tells its attention of the documents."""
    rows = {"tokens": batch.tokens, "labels": batch.labels}
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return rows, {"attention_mask": mask_of(batch.position)}
    rows, documents = shard_batch(rows, batch.position, group, "zigzag")
    return rows, {"attention_mask": None, "packed_seq_params": documents}


def forward_step(batches: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Any]:
    rows, documents = share_of_rank(next(batches))
    labels = rows["labels"]
    # It makes its own positions: rotations are relative, and go on from document to document.
    losses = model(rows["tokens"], None, labels=labels.clamp_min(0), **documents)
    return losses, partial(loss_sum, labels != IGNORED)


def loss_sum(is_predicted: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the number of its tokens, and both for the record."""
    total, tokens = (losses * is_predicted).sum(), is_predicted.sum().int()
    return total, tokens, torch.stack([total.detach(), tokens]).double()


def run_case(_: str, config: Config, __: torch.device) -> dict[str, Any]:
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
    )
    model, stream = build_model(config), open_stream(config)
    data_rank = parallel_state.get_data_parallel_rank()
    data_ranks = parallel_state.get_data_parallel_world_size()
    batches = read_microbatches(stream, config.train, data_rank, data_ranks)
    records = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=config.data.seq_len,
        micro_batch_size=config.train.microbatch,
        forward_only=False,
    )
    # Only a last stage has records, and each rank of tp the same ones.
    totals = sum(records, torch.zeros(2, dtype=torch.float64)) / parallel.tp
    dist.all_reduce(totals)
    loss, tokens = totals.tolist()

    mine = pieces(model.module, config.model)
    gradients = whole(mine, model.module.pg_collection, lambda weight: weight.main_grad)
    rows: list[Any] = [None] * dist.get_world_size()
    row = torch.arange(config.data.seq_len)[None]
    dist.all_gather_object(rows, get_batch_on_this_cp_rank({"row": row})["row"][0])
    parallel_state.destroy_model_parallel()
    return {"loss": loss / tokens, "gradients": gradients, "tokens_of_ranks": rows}


if __name__ == "__main__":
    with on_any_device():
        run_cases(run_case)
