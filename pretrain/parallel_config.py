"""The settings of how a model is spread over ranks, and of what it keeps in their memory."""

import math
from typing import Annotated, Literal

from pydantic import Field

from parallel.pipeline.plan import Schedule
from pretrain.errors import UserError
from pretrain.settings import NonNegative, Positive, Section


class PipelineConfig(Section):
    schedule: Schedule = Field(
        "1f1b", description="In which order the stages work on the microbatches."
    )
    stages_per_rank: Positive | Literal["auto"] = Field(
        "auto",
        description="auto: 2 for interleaved, zbv and dualpipev, else 1.",
    )
    layers_per_stage: Literal["balanced"] | tuple[NonNegative, ...] = Field(
        "balanced",
        description="balanced: by predicted cost, with embedding and head; or a list of numbers.",
    )


class ZeroConfig(Section):
    stage: Literal[1, 2, 3] = Field(
        3, description="ZeRO shares out 1 the optimizer's state, 2 gradients too, 3 weights too."
    )
    offload_optimizer: bool = Field(
        False, description="The optimizer's state lies in host memory, and is updated there."
    )
    offload_parameters: bool = Field(
        False, description="Weights wait in host memory; with stage 3 only."
    )
    persistence_threshold: NonNegative = Field(
        100_000,
        description="Elements below which stage 3 leaves a weight whole on every rank.",
    )


Recompute = Literal["none", "selective", "full"]


class ParallelConfig(Section):
    pp: Positive = Field(1, description="Ranks that share the layers, as a pipeline.")
    dp_replicate: Positive = Field(1, description="Replicas of the sharded weights (HSDP).")
    dp_shard: Positive | Literal["auto"] = Field(
        "auto", description="Ranks that share one copy of the weights (FSDP2); auto: all the rest."
    )
    cp: Positive = Field(1, description="Ranks that share a sequence.")
    ulysses: Positive = Field(
        1, description="Neighbours among those of cp that exchange heads; keys go round the rest."
    )
    ep: Positive = Field(
        1, description="Ranks that share the experts, folded over dp_shard x cp x tp."
    )
    tp: Positive = Field(1, description="Ranks that share a layer and its sequence.")
    pipeline: PipelineConfig = PipelineConfig()
    recompute: Recompute | Annotated[tuple[Recompute, ...], Field(min_length=1)] = Field(
        "none",
        description="Which activations are computed again in the backward pass; a list repeats "
        "over the layers.",
    )
    feed_forward_tile: Positive | None = Field(
        None,
        description="Tokens of a rank that go through a feed-forward at a time, forward and "
        "backward; null: all of a microbatch.",
    )
    offload: Literal["none", "host", "disk"] = Field(
        "none",
        description="Where what layers with recompute keep, and what segments of rows hand on, "
        "waits until it is used: on the device, in host memory, or in a file.",
    )
    offload_dir: str | None = Field(
        None,
        description="Folder of that file, on a disk of each machine; a relative one is below the "
        "folder in which the run is prepared.",
    )
    offload_gib: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Most GiB of a rank that wait elsewhere; null: what there is room for."
    )
    dispatcher: Literal["all_to_all", "deepep"] = Field(
        "all_to_all", description="What carries tokens to the experts; deepep needs CUDA."
    )
    zero: ZeroConfig = Field(ZeroConfig(), description="Of train.engine=deepspeed.")


def check_offload(asked: ParallelConfig, segments: int) -> None:
    """Raise UserError where nothing would be offloaded, or nobody said where to.

    Args:
        segments: of a row.
    """
    if asked.offload == "none":
        return
    if segments == 1 and (asked.recompute == "none" or set(asked.recompute) == {"none"}):
        raise UserError(
            f"parallel.offload = {asked.offload} with parallel.recompute = {asked.recompute}: what "
            "waits elsewhere are the inputs of layers that recompute the rest, and what segments "
            "of rows hand on; set parallel.recompute=full, or context.segments to more than 1"
        )
    if (asked.offload == "disk") != (asked.offload_dir is not None):
        wish = "a folder on a disk of each machine" if asked.offload == "disk" else "null"
        raise UserError(
            f"parallel.offload = {asked.offload} with parallel.offload_dir = {asked.offload_dir}: "
            f"set parallel.offload_dir to {wish}"
        )


def fewest_ranks(asked: ParallelConfig) -> int:
    """On how many ranks a layout could be."""
    dp_shard = 1 if asked.dp_shard == "auto" else asked.dp_shard
    ranks = asked.pp * asked.dp_replicate * dp_shard * asked.cp * asked.tp
    # Experts are folded over the ranks of one stage and replica.
    of_experts = asked.pp * asked.dp_replicate * asked.ep
    return math.lcm(ranks, of_experts) if asked.dp_shard == "auto" else ranks
