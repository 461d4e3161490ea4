"""What megatron-core's schedules are given: microbatches, and what becomes of their losses."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.stream import Batch
from pretrain.config import Config
from pretrain.engines.megatron.documents import PackedDocuments, shard_batch
from pretrain.model.kernels.cross_entropy import IGNORED
from pretrain.parts import attention_cost
from pretrain.token_losses import LossGroups


@dataclass(frozen=True)
class Microbatch:
    """This rank's part of one: each [b, T / cp].

    Attributes:
        position: of the tokens in their documents.
        groups: of the tokens, see `LossGroups`.
    """

    tokens: Tensor
    labels: Tensor
    position: Tensor
    groups: Tensor
    documents: PackedDocuments


def share_out(
    config: Config,
    batch: Batch,
    loss_groups: LossGroups,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[Microbatch]:
    """This rank's part of the rows of its data rank.

    Args:
        group: the ranks of context parallelism.
    """
    columns = (batch.tokens, batch.labels, batch.source, batch.position)
    rows = [torch.from_numpy(x).split(config.train.microbatch) for x in columns]
    cost, microbatches = attention_cost(config.model), []
    for tokens, labels, source, position in zip(*rows, strict=True):
        whole = {"tokens": tokens, "labels": labels, "source": source.int()}
        # On the host, so that only this rank's part is sent to the device.
        mine, packed = shard_batch(whole, position, group, cost=cost)
        mine["groups"] = loss_groups.of_tokens(mine.pop("source"), mine["position"])
        assert packed.documents is not None
        packed.documents = packed.documents.to(device)
        on_device = {name: x.to(device) for name, x in mine.items()}
        microbatches.append(Microbatch(documents=packed, **on_device))
    return microbatches


def forward_step(
    loss_groups: LossGroups, microbatches: Iterator[Microbatch], model: nn.Module
) -> tuple[Tensor, Any]:
    """A stage's output, and how it becomes a loss if the stage is the last."""
    batch = next(microbatches)
    losses = model(
        batch.tokens,
        batch.position,
        None,
        labels=batch.labels.clamp_min(0),
        packed_seq_params=batch.documents,
    )
    return losses, partial(_loss_sum, loss_groups, batch)


def _loss_sum(
    loss_groups: LossGroups, batch: Microbatch, losses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the number of its tokens, and for the record: the loss, and `LossGroups.add_up`."""
    is_predicted = batch.labels != IGNORED
    of_tokens = losses.float() * is_predicted
    seen = of_tokens.detach()
    by_group = loss_groups.add_up(seen, batch.labels, batch.groups)
    record = torch.cat([seen.double().sum()[None], by_group])
    return of_tokens.sum(), is_predicted.sum().int(), record
