"""Which part of the model each stage of the pipeline has."""

import torch

from parallel.layout import AttentionCost
from parallel.pipeline.plan import consecutive, split_layers, stages_of_rank
from parallel.pipeline.schedule import PipelineShape
from pretrain.config import Config
from pretrain.layouts import Layout, stages_per_rank
from pretrain.metrics.flops import forward_costs
from pretrain.model.config import ModelConfig
from pretrain.model.transformer import Part
from pretrain.parallel_config import Recompute


def parts_of_rank(config: Config, layout: Layout, pp_rank: int) -> dict[int, Part]:
    """The stages of a place in the pipeline, and their parts of the model."""
    layers = layers_of_stages(config, layout)
    mine = stages_of_rank(
        config.parallel.pipeline.schedule, layout.pp, pp_rank, stages_per_rank(config)
    )
    return {
        stage: Part(layers[stage], embeds=stage == 0, predicts=stage == len(layers) - 1)
        for stage in (mine if layout.pp > 1 else [0])
    }


def layers_of_stages(config: Config, layout: Layout) -> list[range]:
    """The layers of each stage of the whole pipeline."""
    asked = config.parallel.pipeline.layers_per_stage
    n_layers = config.model.n_layers
    if layout.pp == 1:
        return [range(n_layers)]
    if asked != "balanced":
        return consecutive(asked)
    costs = forward_costs(config.model, config.data.seq_len)
    n_stages = layout.pp * stages_per_rank(config)
    return split_layers(costs.layers, n_stages, costs.embedding, costs.head)


def recompute_modes(config: Config) -> tuple[Recompute, ...]:
    """Which activations a layer computes again, repeated over the layers."""
    asked = config.parallel.recompute
    return (asked,) if isinstance(asked, str) else asked


def recomputes(config: Config) -> bool:
    """Whether a backward pass computes anything again."""
    is_tiled = config.parallel.feed_forward_tile is not None
    return is_tiled or set(recompute_modes(config)) != {"none"}


def attention_cost(model: ModelConfig) -> AttentionCost:
    """What a token costs by its place in a document, in the layers that look back."""
    kinds = model.layer_kinds()
    return AttentionCost(kinds.count("softmax"), kinds.count("sliding"), model.attention.window)


def pipeline_shape(config: Config, layout: Layout) -> PipelineShape | None:
    """What the ranks of a pipeline agree on; None without one."""
    if layout.pp == 1:
        return None
    train, seq_len = config.train, config.data.seq_len
    return PipelineShape(
        schedule=config.parallel.pipeline.schedule,
        n_stages=layout.pp * stages_per_rank(config),
        n_microbatches=train.global_batch // (layout.data_ranks * train.microbatch),
        tokens=(train.microbatch, seq_len // layout.cp),
        hidden=(train.microbatch, seq_len // (layout.cp * layout.tp), config.model.d_model),
        dtype=getattr(torch, train.dtype),
        splits_backward=not recomputes(config),
    )
