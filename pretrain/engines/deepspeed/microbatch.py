"""A rank's part of its rows, microbatch by microbatch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline.stream import Batch
from pretrain.config import Config
from pretrain.engines.deepspeed.ulysses import ConsecutiveDocuments
from pretrain.layouts import Layout
from pretrain.model.kernels.documents import Documents
from pretrain.share import share_of_rank
from pretrain.token_losses import LossGroups


class Microbatch(NamedTuple):
    """On the device.

    Attributes:
        tokens, labels: [b, T / cp].
        documents: as the layers of the layout take them.
        groups: [b, T / cp], of `LossGroups`.
    """

    tokens: Tensor
    labels: Tensor
    documents: Any
    groups: Tensor


class Rows:
    """Cuts the rows of a data rank.

    Args:
        rank: this rank's place among those of `cp`.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        rank: int,
        loss_groups: LossGroups,
        device: torch.device,
    ) -> None:
        self._config, self._rank, self._ulysses = config, rank, layout.ulysses
        self._loss_groups, self._device = loss_groups, device

    def microbatches(self, batch: Batch) -> list[Microbatch]:
        """This rank's part of the rows."""
        columns = map(torch.from_numpy, (batch.position, batch.tokens, batch.labels, batch.source))
        split = (column.split(self._config.train.microbatch) for column in columns)
        return [self._part(*rows) for rows in zip(*split, strict=True)]

    def _part(self, position: Tensor, *columns: Tensor) -> Microbatch:
        """position, and tokens, labels and sources [b, T] -> those of this rank."""
        documents: Any = Documents.from_position(position)
        if self._ulysses > 1:
            documents = ConsecutiveDocuments.of_rank(documents, self._rank, self._ulysses)
            tokens, labels, source = (x.chunk(self._ulysses, 1)[self._rank] for x in columns)
        else:
            share = share_of_rank(self._config, documents, self._rank)
            documents, mine = share.documents, share.tokens
            tokens, labels, source = (x if mine is None else x.gather(1, mine) for x in columns)
        groups = self._loss_groups.of_tokens(source, documents.position)
        tokens, labels, groups = (
            x.to(self._device, non_blocking=True) for x in (tokens, labels, groups)
        )
        return Microbatch(tokens, labels, documents.to(self._device), groups)
