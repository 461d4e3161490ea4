"""The gated delta rule under `cp`: ranks exchange states, not tokens.

What a block of tokens makes of the state S that comes into it is affine, S -> M S + B, and so is
its output. Each rank scans its blocks without knowing S, one all-gather tells all ranks the (M, B)
of every block, and every rank computes the chain of states in the order of the row. Backward, the
gradient of a block's incoming state is M^T dS + L, where dS is that of its outgoing state; one
all-gather tells the L. Blocks may lie on any rank, so zigzag needs no other layout; where a
document starts in a block, M is zero.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.comm import Communicator
from parallel.context.documents import SplitDocuments
from parallel.layout import RowLayout
from pretrain.model.kernels.gated_delta import (
    CHUNK_TOKENS,
    check_shapes,
    close_scan,
    compute_dtype,
    open_scan,
    scan,
    scan_backward,
)


class ContextScan:
    """Takes the place of `gated_delta.scan`.

    For each block and value head, each rank sends D (D + E) numbers forward and D E backward to
    every other rank, float32 or wider, whatever the length of the sequence. All ranks send as many
    blocks as the one that has most.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        documents: SplitDocuments,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `gated_delta_rule`; the tokens are this rank's.

        `initial_state` and the final state are those of the whole rows, equal on all ranks, and so
        are their gradients.
        """
        check_shapes(q, k, v, g, beta, initial_state, documents)
        plan: StatePlan = documents.plan(StatePlan, initial_state is not None)
        if initial_state is None:
            shape = (*v.shape[:2], q.shape[-1], v.shape[-1])
            initial_state = v.new_zeros(shape, dtype=compute_dtype(v))
        return _ContextScan.apply(q, k, v, g, beta, initial_state, plan, self.comm)


class BlockOfRows(NamedTuple):
    """One of this rank's blocks, of rows that are laid out alike.

    Attributes:
        rows, tokens: where it lies in tensors [B, H, t, ...].
        slot: its place in what the rank sends.
        resets: [rows, tokens] bool, see `scan`; None where no document starts.
        open_tokens: how many tokens see the state that comes in; None where that is known.
    """

    rows: slice
    tokens: slice
    slot: int
    resets: Tensor | None
    open_tokens: int | None


class StatePlan:
    """Where states go.

    Attributes:
        mine: this rank's blocks.
        slots: what each rank sends, filled up with zeros where it has fewer blocks.
        chains: of rows that are laid out alike, the rank and slot of each block, in their order.
    """

    def __init__(self, documents: SplitDocuments, has_initial_state: bool) -> None:
        self.mine: list[BlockOfRows] = []
        self.chains: list[tuple[slice, list[tuple[int, int]]]] = []
        used = [0] * len(documents.layouts[0].blocks)
        starts = documents.position == 0
        for rows, layout in documents.groups():
            first_slots = list(used)
            for rank, blocks in enumerate(layout.blocks):
                used[rank] += len(blocks)
            numbers = {
                (rank, block.start): first_slots[rank] + number
                for rank, blocks in enumerate(layout.blocks)
                for number, block in enumerate(blocks)
            }
            chain = [(rank, numbers[rank, block.start]) for block, rank, _ in layout.held]
            self.chains.append((rows, chain))
            place = 0
            for number, block in enumerate(layout.blocks[documents.rank]):
                tokens = slice(place, place + len(block))
                place += len(block)
                slot = first_slots[documents.rank] + number
                resets = _resets(starts[rows, tokens], layout, block)
                is_known = block.start == 0 and not has_initial_state
                n_open = None if is_known else _open_tokens(layout, block)
                self.mine.append(BlockOfRows(rows, tokens, slot, resets, n_open))
        self.slots = max(used)


def _open_tokens(layout: RowLayout, block: range) -> int:
    """How many of a block's tokens are of a document that began before it."""
    first = next((d.start for d in layout.documents if d.start >= max(block.start, 1)), block.stop)
    return min(first, block.stop) - block.start


def _resets(starts: Tensor, layout: RowLayout, block: range) -> Tensor | None:
    if _open_tokens(layout, block) == len(block):
        return None
    if block.start == 0:
        starts = starts.clone()
        starts[:, 0] = False
    return starts


class _ContextScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        plan: StatePlan,
        comm: Communicator,
    ) -> tuple[Tensor, Tensor]:
        scale, E = q.shape[-1] ** -0.5, v.shape[-1]
        initial = initial_state.to(compute_dtype(v))
        summaries = _Slots(plan, initial, E + q.shape[-1])
        scanned = []
        for block in plan.mine:
            inputs = _of_block(block, (q, k, v, g, beta))
            if block.open_tokens is None:
                result = scan(*inputs, initial[block.rows], block.resets, scale, CHUNK_TOKENS)
                summaries.tensor[block.slot, ..., :E] = result[1]
            else:
                result = open_scan(
                    *inputs,
                    resets=block.resets,
                    open_tokens=block.open_tokens,
                    scale=scale,
                    chunk_size=CHUNK_TOKENS,
                )
                summaries.tensor[block.slot, ..., :E] = result.state
                summaries.tensor[block.slot, ..., E:] = result.transfer
            scanned.append(result)
        B, M = summaries.gather(comm).split([E, q.shape[-1]], dim=-1)

        coming: dict[int, Tensor] = {}
        final = torch.empty_like(initial)
        for rows, chain in plan.chains:
            S = initial[rows]
            for rank, slot in chain:
                if rank == comm.rank:
                    coming[slot] = S
                S = B[rank, slot] + M[rank, slot] @ S
            final[rows] = S

        out, saved = torch.empty_like(v), []
        for block, result in zip(plan.mine, scanned, strict=True):
            if block.open_tokens is None:
                block_out, _, borders = result
                read = borders.new_empty(0)
            else:
                block_out, borders = close_scan(result, coming[block.slot])
                read = result.read
            out[block.rows, :, block.tokens] = block_out
            saved += [borders, read]
        ctx.save_for_backward(q, k, v, g, beta, initial_state, M.contiguous(), *saved)
        ctx.plan, ctx.comm = plan, comm
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, initial_state, M, *saved = ctx.saved_tensors
        plan, comm, scale = ctx.plan, ctx.comm, q.shape[-1] ** -0.5
        d_final = d_final.to(M.dtype)
        summaries = _Slots(plan, d_final, v.shape[-1])
        for block, read in zip(plan.mine, saved[1::2], strict=True):
            if block.open_tokens:
                d_seen = d_out[block.rows, :, block.tokens][:, :, : block.open_tokens]
                summaries.tensor[block.slot] = read.mT @ d_seen.to(M.dtype)
        L = summaries.gather(comm)

        leaving: dict[int, Tensor] = {}
        d_initial = torch.empty_like(d_final)
        for rows, chain in plan.chains:
            dS = d_final[rows]
            for rank, slot in reversed(chain):
                if rank == comm.rank:
                    leaving[slot] = dS
                dS = L[rank, slot] + M[rank, slot].mT @ dS
            d_initial[rows] = dS

        inputs = (q, k, v, g, beta)
        gradients = [torch.empty_like(x) for x in inputs]
        for block, borders in zip(plan.mine, saved[::2], strict=True):
            parts = scan_backward(
                d_out[block.rows, :, block.tokens],
                leaving[block.slot],
                *_of_block(block, inputs),
                borders,
                block.resets,
                scale,
                CHUNK_TOKENS,
            )
            for gradient, part in zip(gradients, parts[:-1], strict=True):
                gradient[block.rows, :, block.tokens] = part
        return *gradients, d_initial.to(initial_state.dtype), None, None


class _Slots:
    """What a rank tells the others, a matrix [D, width] for each block, row and head.

    Attributes:
        tensor: [slots, rows laid out alike, H, D, width], zero at first.
    """

    def __init__(self, plan: StatePlan, states: Tensor, width: int) -> None:
        n_rows = len(states) // len(plan.chains)
        self.tensor = states.new_zeros(plan.slots, n_rows, *states.shape[1:3], width)

    def gather(self, comm: Communicator) -> Tensor:
        """[ranks, slots, ...] of all ranks."""
        return comm.start_all_gather(self.tensor[None], 0).wait()


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _of_block(block: BlockOfRows, inputs: Inputs) -> Inputs:
    q, k, v, g, beta = (x[block.rows, :, block.tokens] for x in inputs)
    return q, k, v, g, beta
