"""Ring attention: keys and values go round the ranks, while each computes with those it has.

Liu et al. 2023, arXiv:2310.01889. The blocks that a rank's queries see of each other rank's keys
come from the layout, so that packed documents and layouts other than zigzag are the same code.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.comm import Communicator, Pending, keep_as_one
from parallel.context.blocks import last_ring_step, ring_blocks
from parallel.context.documents import SplitDocuments
from pretrain.model.kernels.attention import Block, attend, attend_backward, lse_like


class RingPlan:
    """What a rank computes in each step of the ring.

    Attributes:
        steps: the blocks of each step, up to the last one in which any rank has some.
    """

    def __init__(self, documents: SplitDocuments, ranks: int) -> None:
        groups, first = documents.seen()
        rank = documents.rank
        blocks = ring_blocks(groups, rank, ranks, first)
        steps = range(last_ring_step(groups, ranks, first) + 1)
        self.steps: list[list[Block]] = [blocks[(rank - step) % ranks] for step in steps]


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, comm: Communicator, *, scale: float
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks; differentiable.

    Sends, for n ranks, 2 (n - 1) t H_kv D elements forward, and backward as many again and 2 n t
    H_kv D gradients in float32, for t tokens per rank; nothing after the plan's last step.

    Args:
        q: [B, H, t, D], of this rank's tokens.
        k, v: [B, Hkv, t, D]; the rank's keys of earlier tokens before them, where
            `documents.seen` has such.
    """
    out: Tensor = _RingAttention.apply(q, k, v, plan, comm, scale)
    return out


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RingPlan,
        comm: Communicator,
        scale: float,
    ) -> Tensor:
        out, lse = keep_as_one(partial(_attend_around, q, k, v, plan, comm, scale))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.comm, ctx.scale = plan, comm, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, comm = ctx.plan, ctx.comm
        dtype = lse.dtype
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        kv = torch.stack([k, v])
        passing: Pending | None = None
        # The gradients of keys and values go round with them, one step behind.
        following: Pending | None = None
        for step, blocks in enumerate(plan.steps):
            if passing is not None:
                kv = passing.wait()
            if step + 1 < len(plan.steps):
                passing = comm.start_shift(kv)
            d_kv = torch.zeros(kv.shape, dtype=dtype, device=kv.device)
            for block in blocks:
                gradients = (dq, d_kv[0], d_kv[1])
                attend_backward(d_out, q, kv[0], kv[1], out, lse, gradients, block, ctx.scale)
            if following is not None:
                d_kv += following.wait()
            onward = 1 if step + 1 < len(plan.steps) else -step % comm.size
            following = comm.start_shift(d_kv, onward) if onward else None
        if following is not None:
            d_kv = following.wait()
        dk, dv = d_kv.to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None


def _attend_around(
    q: Tensor, k: Tensor, v: Tensor, plan: RingPlan, comm: Communicator, scale: float
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp."""
    lse = lse_like(q)
    merged = torch.empty(q.shape, dtype=lse.dtype, device=q.device)
    passing: Pending | None = None
    kv = torch.stack([k, v])
    for step, blocks in enumerate(plan.steps):
        if passing is not None:
            kv = passing.wait()
        if step + 1 < len(plan.steps):
            passing = comm.start_shift(kv)
        for block in blocks:
            attend(q, kv[0], kv[1], merged, lse, block, scale)
    return merged.to(q.dtype), lse
