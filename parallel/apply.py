"""How a model is spread over ranks: the one function to read first."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from parallel.comm import Communicator
from parallel.context.split import split_sequence
from parallel.expert.sequence import split_rows
from parallel.expert.shard import Dispatcher, shard_experts
from parallel.feed_forward import tile_feed_forwards
from parallel.fsdp import shard_weights
from parallel.fsdp_traffic import Sent
from parallel.mesh import Mesh
from parallel.offload import Store
from parallel.pipeline.schedule import Pipeline, PipelineShape, SingleStage
from parallel.recompute import Recompute, recompute_layers
from parallel.replicas import Replicas, TiedCopy
from parallel.segments.documents import SegmentDocuments
from parallel.segments.layers import carry_over_segments
from parallel.segments.runner import SegmentedStage
from parallel.stage import Objective, Stage
from parallel.stopwatch import Stopwatch
from parallel.tensor.shard import shard_layers
from parallel.tensor.vocabulary import ShardedCrossEntropy, shard_vocabulary
from pretrain.model.kernels.documents import Documents


@dataclass(frozen=True)
class Spread:
    """How to spread a model, besides the mesh.

    Attributes:
        dtype: of the computation.
        dispatcher: what carries tokens to the experts of other ranks.
        recompute: which activations a layer computes again, repeated over the layers.
        feed_forward_tile: tokens of a rank that go through a feed-forward at a time; None is all.
        store: where the inputs of layers that recompute wait, and what segments of rows hand on;
            None leaves them on the device.
        microbatch: sequences of a microbatch.
        in_segments: whether rows are computed in segments, one after the other.
        pipeline: what its ranks agree on; None without a pipeline.
    """

    dtype: torch.dtype
    dispatcher: Dispatcher = "all_to_all"
    recompute: Sequence[Recompute] = ("none",)
    feed_forward_tile: int | None = None
    store: Store | None = None
    microbatch: int = 1
    in_segments: bool = False
    pipeline: PipelineShape | None = None


@dataclass
class Parallelised:
    """The stages of a model that live on this rank, and what it takes to train them.

    Attributes:
        stages: in the order of the model.
        runner: runs microbatches through them.
        weights: a module that holds each weight of this rank once, under its name in the model.
        replicas: what completes gradients after the last backward pass of a step.
        traffic: the counted collectives, by axis.
        of_fsdp: bytes that FSDP has sent, by axis and kind.
        waited: runs while FSDP, or a sum over copies of weights, keeps the computation waiting.
    """

    stages: Sequence[Stage]
    runner: Pipeline | SingleStage | SegmentedStage
    weights: nn.Module
    replicas: Replicas
    traffic: dict[str, Communicator] = field(default_factory=dict)
    of_fsdp: Sent = field(default_factory=Counter)
    waited: Stopwatch = field(default_factory=Stopwatch)

    def sent_bytes(self) -> Sent:
        """What this rank has sent to others so far, by axis and kind; DeepEP, and sums over copies
        of a weight (`Replicas`), are not counted.
        """
        sent = Counter(self.of_fsdp)
        if isinstance(self.runner, Pipeline):
            sent["pp", "send"] = self.runner.sent_bytes
        for axis, communicator in self.traffic.items():
            for kind, n_bytes in communicator.bytes.items():
                sent[axis, kind] += n_bytes
        return sent

    def take_waited_s(self) -> float:
        """How long collectives have kept the computation of this rank waiting since this was asked
        last. What a pipeline passes on is not among them.
        """
        watches = [self.waited, *(comm.waited for comm in self.traffic.values())]
        return sum(watch.take() for watch in watches)

    def as_rows(self, seen: Sequence[Tensor]) -> Tensor:
        """What the last stage has made of each microbatch, or segment of one, of the newest step,
        in the order in which it did so: as this rank's rows [rows, T].
        """
        if isinstance(self.runner, SegmentedStage):
            return self.runner.as_rows(seen)
        return torch.cat(list(seen))

    def forward_backward(
        self,
        tokens: Tensor,
        labels: Tensor,
        documents: Sequence[Documents] | Sequence[Sequence[SegmentDocuments]],
        loss_tokens: int,
    ) -> None:
        """Leave the gradient of this rank's rows [rows, T] in its weights' `.grad`.

        Args:
            documents: of each microbatch, or of each segment of each microbatch.
            loss_tokens: of the global batch.
        """
        for stage in self.stages:
            stage.begin(loss_tokens, documents)
        self.runner.forward_backward(tokens, labels)
        with self.waited.running(tokens.device):
            self.replicas.sum_gradients()


def apply(
    models: Mapping[int, Any],
    objective: Objective,
    mesh: Mesh,
    how: Spread,
    device: torch.device,
) -> Parallelised:
    """Spread plain `Transformer`s, built on the meta device, over the ranks of `mesh`.

    The order matters: an axis sees the weights as the axes before it left them.

    Args:
        models: the parts of the model that this rank's stages are made of, by stage.
        objective: what they are trained for.
    """
    layers: dict[str, Any] = {
        name: layer for model in models.values() for name, layer in model.layers.items()
    }
    moe_layers = [layer.moe for layer in layers.values() if layer.moe is not None]
    traffic: dict[str, Communicator] = {}

    # 1. Tensors: each rank of `tp` keeps its heads, hidden columns and rows of the vocabulary, and
    #    between blocks its part of the sequence.
    if mesh.tp.size() > 1:
        tp = traffic["tp"] = Communicator(mesh.tp.get_group(), "tp")
        shard_layers(layers.values(), mesh.tp, tp)
        for model in models.values():
            shard_vocabulary(model, mesh.tp, tp)
        cross_entropy = ShardedCrossEntropy(objective.cross_entropy, tp)
        objective = replace(objective, cross_entropy=cross_entropy)

    # 2. Experts: each rank of `ep` keeps its share, tokens travel by all-to-all.
    if mesh.ep.size() > 1 and moe_layers:
        traffic["ep"] = shard_experts(moe_layers, mesh, how.dispatcher)

    # 3. Context: each rank of `cp` has a part of every row; keys and states go where they are
    #    seen. Segments of a row come one after the other, and hand them on.
    if mesh.cp.size() > 1:
        traffic |= split_sequence(layers.values(), mesh)
    if how.in_segments:
        cp = traffic.get("cp") or Communicator(mesh.cp.get_group(), "cp")
        carry_over_segments(layers, cp)
    if mesh.tp.size() * mesh.cp.size() > 1:
        split_rows(moe_layers, traffic.get("tp"), traffic.get("cp"))

    # 4. Recompute: layers forget activations, and compute them again in the backward pass; so do
    #    the feed-forwards within them, by tiles of tokens.
    if how.feed_forward_tile is not None:
        tile_feed_forwards(layers.values(), how.feed_forward_tile)
    recompute_layers(layers, how.recompute, how.store)

    # 5. FSDP2, last: it shards what is left on this rank.
    stages = [Stage(model, objective, index) for index, model in models.items()]
    experts = [moe.experts for moe in moe_layers] if mesh.ep.size() * mesh.tp.size() > 1 else []
    of_fsdp: Sent = Counter()
    waited = Stopwatch()
    for stage in stages:
        shard_weights(stage, experts, mesh, how.dtype, of_fsdp, waited)

    # 6. Pipeline: stages work on several microbatches at a time.
    runner: Pipeline | SingleStage | SegmentedStage = SingleStage(stages[0], how.microbatch)
    if how.in_segments:
        runner = SegmentedStage(stages[0], how.microbatch, how.store)
    if how.pipeline is not None:
        runner = Pipeline(stages, mesh.pp.get_group(), how.pipeline, device)

    # 7. Copies: a weight that several ranks hold gets its gradient in parts, summed once a step.
    replicas = Replicas(tied=_tied_copy(stages, mesh))
    if mesh.tp.size() > 1:
        replicas = replace(replicas, tp=mesh.tp.get_group(), whole=dict(_whole_on_tp(stages)))
    weights = _each_weight_once(stages)
    return Parallelised(stages, runner, weights, replicas, traffic, of_fsdp, waited)


def _whole_on_tp(stages: Sequence[Stage]) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights that each rank of `tp` has a copy of, with the gradient of its tokens or heads."""
    for stage in stages:
        for name, weight in stage.model.named_parameters():
            stored: Any = weight
            axes = set(stored.device_mesh.mesh_dim_names)
            if axes <= {"dp_replicate", "fsdp"}:
                yield name, weight


def _each_weight_once(stages: Sequence[Stage]) -> nn.Module:
    """The weights of all stages as one module, without the copy of a tied embedding."""
    if len(stages) == 1 and stages[0].is_first:
        model: nn.Module = stages[0].model
        return model
    weights = nn.Module()
    weights.layers = nn.ModuleDict()
    for stage in stages:
        weights.layers.update(stage.model.layers)
        if stage.is_first:
            weights.embedding = stage.model.embedding
        if stage.is_last:
            weights.norm, weights.lm_head = stage.model.norm, stage.model.lm_head
    return weights


def _tied_copy(stages: Sequence[Stage], mesh: Mesh) -> TiedCopy:
    original = copy = None
    tied = stages[0].model.config.tie_embeddings and mesh.pp.size() > 1
    for stage in stages if tied else ():
        if stage.is_first:
            original = stage.model.embedding.weight
        if stage.is_last:
            copy = stage.model.embedding.weight
    on_one_rank = original is not None and copy is not None
    return TiedCopy(original, copy, None if on_one_rank else mesh.pipeline_ends)
