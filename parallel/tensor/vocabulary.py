"""The vocabulary, shared out over the `tp` axis: embedding and cross-entropy."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from parallel.comm import Communicator
from parallel.tensor.block import shard_weight
from pretrain.model.kernels.cross_entropy import VocabularyShard


def shard_vocabulary(model: Any, mesh: DeviceMesh, comm: Communicator) -> None:
    """Give each rank of `mesh` an equal share of the rows of a `Transformer`'s embeddings.

    Its `embedding` then returns this rank's part of the sequence, [B, T / ranks, d]; its output
    embedding is for `ShardedCrossEntropy`. Tied embeddings stay one weight.
    """
    if model.embedding is not None:
        shard_weight(model.embedding, "weight", mesh, 0)
        model.embedding.forward = ShardedEmbedding(model.embedding, comm)
    if model.lm_head is not None:
        shard_weight(model.lm_head, "weight", mesh, 0)


class ShardedEmbedding:
    """Takes the place of `embedding.forward`: each rank looks up the tokens it has rows for."""

    def __init__(self, embedding: nn.Module, comm: Communicator) -> None:
        self.embedding = embedding
        self.comm = comm

    def __call__(self, tokens_bt: Tensor) -> Tensor:
        weight, first = _local_rows(self.embedding.weight, self.comm)
        row_bt = tokens_bt - first
        is_elsewhere_bt = (row_bt < 0) | (row_bt >= len(weight))
        x_btd = F.embedding(row_bt.masked_fill(is_elsewhere_bt, 0), weight)
        x_btd = x_btd.masked_fill(is_elsewhere_bt.unsqueeze(-1), 0)
        return self.comm.reduce_scatter(x_btd, 1)


class ShardedCrossEntropy:
    """Takes the place of `objective.cross_entropy`, from parts of the sequence and the vocabulary.

    Args:
        cross_entropy: `(hidden [B, T, d], weight [V / ranks, d], labels [B, T], *, shard) -> sum`
            over the tokens.
    """

    def __init__(self, cross_entropy: Callable[..., Tensor], comm: Communicator) -> None:
        self.cross_entropy = cross_entropy
        self.comm = comm

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """hidden [B, T / ranks, d], weight [V, d], labels [B, T] -> the loss of all T on each rank.

        Each rank's backward is to start from the gradient of that whole loss.
        """
        rows, first = _local_rows(weight, self.comm)
        whole_hidden = self.comm.all_gather(hidden, 1)
        shard = VocabularyShard(first, self._stack)
        return self.cross_entropy(whole_hidden, rows, labels, shard=shard)

    def _stack(self, x: Tensor) -> Tensor:
        return self.comm.start_all_gather(x.unsqueeze(0), 0).wait()


def _local_rows(weight: Any, comm: Communicator) -> tuple[Tensor, int]:
    """This rank's rows of a weight, and the number of the first."""
    assert isinstance(weight, DTensor)
    rows: Tensor = weight.to_local()
    return rows, comm.rank * len(rows)
