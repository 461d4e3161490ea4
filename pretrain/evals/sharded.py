"""A trained model in the layout of its training, asked for what it predicts at chosen places."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from parallel.stage import Objective
from pretrain.balancing import RouterState
from pretrain.build import build_mesh, build_model, open_store
from pretrain.checkpoint.trained import load_sharded
from pretrain.config import Config
from pretrain.evals.forward import ForwardPass
from pretrain.evals.predictions import predict
from pretrain.layouts import resolve_layout
from pretrain.model.kernels.cross_entropy import IGNORED, VocabularyShard
from pretrain.model.kernels.documents import Documents
from pretrain.model.transformer import TransformerOutput
from pretrain.run_dir import RunDirectory

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
        objective, store = Objective(self._recorder, _nothing, _nothing), open_store(config)
        parallelised = build_model(config, self.layout, self.mesh, device, objective, store)
        for stage in parallelised.stages:
            stage.to_empty(device=device)
            stage.eval()
        routers = RouterState(config.model.n_layers, config.model.moe)
        load_sharded(run, config, step, parallelised.weights, routers)
        parallelised.replicas.refresh()
        for stage in parallelised.stages:
            routers.copy_to(stage.model.layers)
        self._pass = ForwardPass(config, self.layout, self.mesh, parallelised.stages, device, store)

    def rows_at_a_time(self, length: int) -> int:
        """Rows of `length` tokens that have as many tokens as training has in a forward pass."""
        return self.mesh.data_ranks * self._pass.rows_at_a_time(length)

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
        self._recorder.begin()
        at_labels = self._pass.run(
            torch.from_numpy(tokens[here]), torch.from_numpy(my_labels), documents
        )
        return self._gather(labels, at_labels.numpy() + first * length)

    def _gather(self, labels: Ints, at_labels: Ints) -> Scores:
        """What all ranks have recorded, from this rank's part at places of the flattened rows."""
        wanted = np.flatnonzero(labels.ravel() != IGNORED)
        predicted = torch.zeros(len(wanted), dtype=torch.int64, device=self.device)
        loss = torch.zeros(len(wanted), dtype=torch.float64, device=self.device)
        # Ranks of tp have recorded the same, and only the last stage of a pipeline anything.
        is_last = any(stage.is_last for stage in self._pass.stages.values())
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
