"""A trained model in the layout of its training, asked for what it predicts at chosen places."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from parallel.pipeline.forward import run_forward
from parallel.pipeline.plan import stages_of_rank
from parallel.segments.documents import cut_rows, tokens_of
from parallel.segments.memory import SegmentMemory
from parallel.stage import Objective
from pretrain.balancing import RouterState
from pretrain.build import build_mesh, build_model
from pretrain.checkpoint.trained import load_sharded
from pretrain.config import Config
from pretrain.evals.predictions import predict
from pretrain.layouts import resolve_layout, stages_per_rank
from pretrain.model.kernels.cross_entropy import IGNORED, VocabularyShard
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import TransformerOutput
from pretrain.parts import attention_cost
from pretrain.run_dir import RunDirectory
from pretrain.share import RankShare, share_of_rank

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """What a model makes of labels, in the order of rows and of places in them.

    Attributes:
        predicted: [n] int64, the likeliest token; -1 where the logits are not finite.
        loss: [n] float64, the cross-entropy in nats.
    """

    predicted: Ints
    loss: NDArray[np.float64]


class ShardedModel:
    """The model of a run's checkpoint, on the ranks of this job. Collective.

    Each rank keeps the part of a row that it would keep in training, and logits exist only at
    labels. What ranks exchange of the results are a token and a number for each label.
    """

    def __init__(self, config: Config, run: RunDirectory, step: int, device: torch.device) -> None:
        """
        Args:
            config: that the checkpoint was trained with, and the layout to use; `resolve_layout`
                accepts it.
            step: of the checkpoint, the same on all ranks.
        """
        self.config, self.step, self.device = config, step, device
        self.layout = resolve_layout(config, dist.get_world_size())
        self.mesh = build_mesh(config, self.layout, device)
        self._recorder = _Recorder(config.train.loss_chunk)
        objective = Objective(self._recorder, _nothing, _nothing)
        parallelised = build_model(config, self.layout, self.mesh, device, objective)
        self._stages = {stage.index: stage for stage in parallelised.stages}
        for stage in self._stages.values():
            stage.to_empty(device=device)
            stage.eval()
        routers = RouterState(config.model.n_layers, config.model.moe)
        load_sharded(run, config, step, parallelised.weights, routers)
        parallelised.replicas.refresh()
        for stage in self._stages.values():
            routers.copy_to(stage.model.layers)

    def rows_at_a_time(self, length: int) -> int:
        """Rows of `length` tokens that have as many tokens as training has in a forward pass."""
        tokens = self.config.train.microbatch * self.config.data.seq_len
        return self.mesh.data_ranks * max(1, tokens // length)

    @torch.no_grad()
    def score(self, tokens: Ints, labels: Ints, position: Ints | None = None) -> Scores:
        """Run the model once over rows of tokens. Collective, and the same on all ranks.

        Args:
            tokens: [rows, T]; cp x tp divides T.
            labels: [rows, T], the token after each; IGNORED where it does not matter.
            position: [rows, T], as of `Batch`; None is one document per row.
        """
        rows, length = tokens.shape
        share = -(-rows // self.mesh.data_ranks)
        first = self.mesh.data_rank * share
        # Every rank takes part in every forward pass: who has no row left repeats the last one.
        mine = np.arange(first, first + share)
        here = mine.clip(max=rows - 1)
        my_labels = labels[here]
        my_labels[mine >= rows] = IGNORED
        documents = Documents.whole_rows(share, length)
        if position is not None:
            documents = Documents.from_position(torch.from_numpy(position[here]))
        at_labels = self._run(
            torch.from_numpy(tokens[here]), torch.from_numpy(my_labels), documents
        )
        return self._gather(labels, at_labels.numpy() + first * length)

    def _run(self, tokens: Tensor, labels: Tensor, documents: Documents) -> Tensor:
        """One forward pass of this data rank's rows, segment by segment where training does so.

        Returns:
            The labels that this rank has, as places in the flattened rows, as they were recorded.
        """
        share = self._share_of(documents)
        length = tokens.shape[1]
        if share.tokens is not None:
            tokens, labels = tokens.gather(1, share.tokens), labels.gather(1, share.tokens)
        in_row = torch.arange(length) if share.tokens is None else share.tokens
        places = torch.arange(len(tokens))[:, None] * length + in_row
        parts = share.documents if isinstance(share.documents, list) else [share.documents]
        columns = (x.chunk(len(parts), dim=1) for x in (tokens, labels, places))
        self._recorder.begin()
        recorded = []
        for of_tokens, of_labels, of_places, part in zip(*columns, parts, strict=True):
            recorded.append(of_places[of_labels != IGNORED])
            self._forward(
                of_tokens.to(self.device), of_labels.to(self.device), part.to(self.device)
            )
        return torch.cat(recorded)

    def _share_of(self, documents: Documents) -> RankShare:
        """What this rank of cp has of rows of any length, in segments of the training's length."""
        config, rank = self.config, self.mesh.cp.get_local_rank()
        if not config.context.in_segments:
            return share_of_rank(config, documents, rank)
        length = documents.position.shape[1]
        count = max(1, length * config.context.segments // config.data.seq_len)
        if count > 1:
            context = config.context.model_copy(update={"segments": count})
            return share_of_rank(config.model_copy(update={"context": context}), documents, rank)
        cost = attention_cost(config.model)
        whole = cut_rows(documents.lengths, 1, SegmentMemory(1), rank, self.layout.cp, cost)
        return RankShare(whole, tokens_of(whole))

    def _forward(self, tokens: Tensor, labels: Tensor, documents: Documents) -> None:
        """All stages, once."""
        for stage in self._stages.values():
            stage.begin(1, [documents])
        if self.layout.pp == 1:
            self._stages[0](tokens, labels)
            return
        schedule, per_rank = self.config.parallel.pipeline.schedule, stages_per_rank(self.config)
        owners = {
            stage: rank
            for rank in range(self.layout.pp)
            for stage in stages_of_rank(schedule, self.layout.pp, rank, per_rank)
        }
        hidden = torch.empty(
            len(tokens),
            tokens.shape[1] // self.layout.tp,
            self.config.model.d_model,
            dtype=getattr(torch, self.config.train.dtype),
            device=self.device,
        )
        in_order = [owners[stage] for stage in sorted(owners)]
        group = self.mesh.pp.get_group()
        run_forward(self._stages, in_order, group, tokens, labels, hidden)

    def _gather(self, labels: Ints, at_labels: Ints) -> Scores:
        """What all ranks have recorded, from this rank's part at places of the flattened rows."""
        wanted = np.flatnonzero(labels.ravel() != IGNORED)
        predicted = torch.zeros(len(wanted), dtype=torch.int64, device=self.device)
        loss = torch.zeros(len(wanted), dtype=torch.float64, device=self.device)
        # Ranks of tp have recorded the same, and only the last stage of a pipeline anything.
        is_last = any(stage.is_last for stage in self._stages.values())
        if is_last and self.mesh.tp.get_local_rank() == 0:
            index = torch.from_numpy(np.searchsorted(wanted, at_labels)).to(self.device)
            predicted[index] = torch.cat(self._recorder.predicted)
            loss[index] = torch.cat(self._recorder.loss).double()
        for tensor in (predicted, loss):
            dist.all_reduce(tensor)
        return Scores(predicted.cpu().numpy(), loss.cpu().numpy())


class _Recorder:
    """Takes the place of a cross-entropy, and keeps what is predicted where labels are.

    Attributes:
        predicted, loss: of each call since `begin`, see `predict`.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self.begin()

    def begin(self) -> None:
        self.predicted: list[Tensor] = []
        self.loss: list[Tensor] = []

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard | None = None
    ) -> Tensor:
        is_label = labels != IGNORED
        predicted, loss = predict(hidden[is_label], weight, labels[is_label], self._chunk, shard)
        self.predicted.append(predicted)
        self.loss.append(loss)
        return loss.sum()


def _nothing(out: TransformerOutput) -> Tensor:
    """Of what layers add to the loss, or measure."""
    return out.z.new_zeros(())
