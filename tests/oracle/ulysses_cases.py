"""Attention with heads exchanged, ours and DeepSpeed's; run on N ranks by test_ulysses.py.

Arguments: the file for results. DeepSpeed has consecutive tokens on each rank, we have those of our
layout: both are cut from the same whole tensors, and what comes of them is put together again.
"""

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from parallel.comm import Communicator
from parallel.context.attention import ContextAttention
from parallel.context.documents import SplitDocuments
from parallel.layout import RowLayout, split_row
from parallel.mesh import join_ranks
from pretrain.engines.deepspeed.ranks import join_deepspeed

TOKENS = 96
# The lengths of the documents of each row.
ROWS = {"whole": [[TOKENS], [TOKENS]], "packed": [[37, 1, 58], [20, 76]]}
QUERY_HEADS, HEAD_DIM = 8, 16
KEY_HEADS = [8, 4, 2]

# (q, k, v) -> out, [B, heads, t, D] each, of this rank's tokens.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def our_attention(layouts: Sequence[RowLayout]) -> Attention:
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("ring", "ulysses"))
    ring, ulysses = (Communicator(mesh.get_group(axis), axis) for axis in ("ring", "ulysses"))
    documents = SplitDocuments.of_rank(layouts, dist.get_rank())

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        core = ContextAttention(ring, ulysses)
        return core(q, k, v, documents, scale=HEAD_DIM**-0.5, window=None)

    return attention


def their_attention(rows: Sequence[Sequence[int]]) -> Attention:
    """DeepSpeed's exchange around torch's attention, with tensors [B, t, heads, D]."""
    document = torch.stack(
        [torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in rows]
    )
    visible = (document[:, None, :, None] == document[:, None, None, :]).tril()

    def of_some_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        # Not the kernel that computes ours.
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)
        return out.transpose(1, 2)

    exchange = DistributedAttention(of_some_heads, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return exchange(q, k, v, batch_dim_idx=0).transpose(1, 2)

    return attention


def run(attention: Attention, whole: Sequence[Tensor], order: Tensor) -> dict[str, Tensor]:
    """The whole output and gradients, computed on ranks that share the tokens in this order.

    Args:
        whole: q, k, v and the gradient of the output, [B, heads, T, D].
        order: [B, T], the tokens of the first rank, then those of the second.
    """
    mine = order.chunk(dist.get_world_size(), 1)[dist.get_rank()]
    *inputs, d_out = (x.take_along_dim(mine[:, None, :, None], 2) for x in whole)
    inputs = [x.requires_grad_() for x in inputs]
    out = attention(*inputs)
    out.backward(d_out)
    back = order.argsort(1)[:, None, :, None]
    parts = {"out": out.detach()} | dict(zip("qkv", (x.grad for x in inputs), strict=True))
    return {name: gather(part).take_along_dim(back, 2) for name, part in parts.items()}


def gather(part: Tensor) -> Tensor:
    """[B, heads, t, D] of each rank -> [B, heads, T, D]."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts, 2)


def run_case(rows: Sequence[Sequence[int]], n_key_heads: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(len(rows), heads, TOKENS, HEAD_DIM, generator=generator, dtype=torch.float64)
        for heads in (QUERY_HEADS, n_key_heads, n_key_heads, QUERY_HEADS)
    ]
    ranks = range(dist.get_world_size())
    layouts = [split_row(lengths, len(ranks)) for lengths in rows]
    balanced = [[torch.from_numpy(row.tokens_of(rank)) for rank in ranks] for row in layouts]
    consecutive = torch.arange(TOKENS).expand(len(rows), TOKENS)
    return {
        "ours": run(our_attention(layouts), whole, torch.stack(list(map(torch.cat, balanced)))),
        "theirs": run(their_attention(rows), whole, consecutive),
    }


def main() -> None:
    join_deepspeed(join_ranks(timedelta(minutes=10)))
    results = {
        f"{name}-{heads}-key-heads": run_case(rows, heads)
        for name, rows in ROWS.items()
        for heads in KEY_HEADS
    }
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
