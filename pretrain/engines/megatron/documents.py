"""The documents of a batch on their way through megatron-core, and this rank's part of its rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from parallel.context.documents import SplitDocuments
from parallel.layout import AttentionCost, RowLayout, split_row, zigzag
from pretrain.errors import UserError
from pretrain.model.kernels.documents import Documents


@dataclass
class PackedDocuments(PackedSeqParams):
    """Takes the way of megatron-core's own packed sequences, through recomputation too.

    Attributes:
        documents: this rank's part of the rows [B, T / cp]. Rows stay rows: `qkv_format` is "sbhd".
    """

    documents: SplitDocuments | None = None


def shard_batch(
    batch: Mapping[str, Tensor],
    position: Tensor,
    group: dist.ProcessGroup,
    layout: Literal["balanced", "zigzag"] = "balanced",
    cost: AttentionCost | None = None,
) -> tuple[dict[str, Tensor], PackedDocuments]:
    """This rank's tokens of rows that the ranks of `group` share.

    For rows of one document each, both layouts are what megatron-core's own
    `get_batch_on_this_cp_rank` makes; it lays out packed documents as "zigzag", too, where ranks
    then have unequal work.

    Args:
        batch: tensors [B, T, ..].
        position: [B, T] int64, of each token in its document: 0 starts one, and so does a row.
            On the host it is read without waiting for a GPU.
        group: the ranks of context parallelism.
        layout: "balanced" gives each rank equal tokens and equal work; positions are then not what
            megatron-core's rotary embedding takes for granted, so that `RingAttention` has to
            rotate. "zigzag" is for megatron-core's.
        cost: how layers look back; None: all at the whole document.

    Returns:
        The batch and its "position", [B, T / cp, ..] each, and what to pass as
        `packed_seq_params`.

    Raises:
        UserError: the row does not divide.
    """
    ranks, rank, tokens = group.size(), group.rank(), position.shape[1]
    check_divides(tokens, ranks)
    rows = Documents.from_position(position).lengths
    if layout == "balanced":
        layouts = [split_row(row, ranks, cost) for row in rows]
    else:
        layouts = [RowLayout(row, zigzag(tokens, ranks)) for row in rows]
    mine = [torch.from_numpy(row.tokens_of(rank)) for row in layouts]
    places, device = torch.stack(mine), next(iter(batch.values()), position).device
    documents = SplitDocuments.of_rank(layouts, rank).to(device)
    sharded = {name: _gather(x, places.to(x.device)) for name, x in batch.items()}
    sharded["position"] = documents.position
    return sharded, PackedDocuments(
        qkv_format="sbhd", max_seqlen_q=tokens, max_seqlen_kv=tokens, documents=documents
    )


def documents_of(
    packed: PackedSeqParams | None,
    mask: Tensor | None,
    batch: int,
    tokens: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> SplitDocuments:
    """What a layer was told of its documents; nothing is one document a row, in zigzag.

    Args:
        tokens: of this rank's part of a row.

    Raises:
        UserError: it was told in a way that would be ignored.
    """
    if mask is not None:
        raise UserError(
            "attention_mask: farspan's layers are causal within documents and read no mask; pass "
            "None, and documents as packed_seq_params from shard_batch"
        )
    if packed is None:
        return _whole_rows(batch, tokens * group.size(), group.size(), group.rank(), device)
    documents = getattr(packed, "documents", None)
    if documents is None:
        raise UserError(
            f"packed_seq_params of format {packed.qkv_format}: farspan's layers know documents "
            "from shard_batch only; pass what it returns"
        )
    if len(documents.layouts[0].blocks) != group.size():
        raise UserError(
            f"packed_seq_params are for {len(documents.layouts[0].blocks)} ranks, the layer has "
            f"{group.size()} that share rows; give shard_batch the group of context parallelism"
        )
    if documents.position.shape != (batch, tokens):
        raise UserError(
            f"packed_seq_params are of a batch {tuple(documents.position.shape)}, the layer got "
            f"{(batch, tokens)}; pass tokens and documents of one shard_batch"
        )
    return documents


def check_divides(tokens: int, ranks: int) -> None:
    """Raise UserError where ranks cannot share a row."""
    if ranks > 1 and tokens % (2 * ranks):
        raise UserError(
            f"a row of {tokens} tokens on {ranks} ranks of context parallelism: its length has to "
            f"be a multiple of {2 * ranks}"
        )


@lru_cache(maxsize=4)
def _whole_rows(
    batch: int, tokens: int, ranks: int, rank: int, device: torch.device
) -> SplitDocuments:
    check_divides(tokens, ranks)
    row = RowLayout((tokens,), zigzag(tokens, ranks))
    return SplitDocuments.of_rank([row] * batch, rank).to(device)


def _gather(x: Tensor, places: Tensor) -> Tensor:
    rows: Any = torch.arange(len(x), device=x.device)[:, None]
    return x[rows, places]
