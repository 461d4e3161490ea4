"""The gated delta rule under `cp`: ranks exchange states, not tokens.

What a block of tokens makes of the state S that comes into it is affine, S -> M S + B, and so is
its output. Each rank scans its blocks without knowing S, one all-gather tells all ranks the (M, B)
of every block, and every rank computes the chain of states in the order of the row. Backward, the
gradient of a block's incoming state is M^T dS + L, where dS is that of its outgoing state; one
all-gather tells the L. Blocks may lie on any rank, so zigzag needs no other layout; where a
document starts in a block, M is zero.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.comm import Communicator, keep_as_one
from parallel.context.documents import SplitDocuments
from parallel.layout import RowLayout
from pretrain.model.kernels.gated_delta import check_shapes
from pretrain.model.kernels.gated_delta_scan import (
    CHUNK_TOKENS,
    KNOWN,
    Scan,
    close,
    compute_dtype,
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


class Blocks(NamedTuple):
    """This rank's blocks of rows that are laid out alike.

    Attributes:
        rows: of the batch.
        sizes: tokens of each block; they lie one after the other.
        open_tokens: of each block, see `scan`.
        resets: [rows, t] bool, see `scan`; None where no document starts.
        chain: rank and number of each block of all ranks, in the order of the row.
    """

    rows: slice
    sizes: list[int]
    open_tokens: list[int]
    resets: Tensor | None
    chain: list[tuple[int, int]]


class StatePlan:
    """Where states go.

    Attributes:
        groups: the rows.
        slots: the most blocks that any rank has in a row; each sends so many states.
    """

    def __init__(self, documents: SplitDocuments, has_initial_state: bool) -> None:
        starts = documents.position == 0
        self.groups: list[Blocks] = []
        for rows, layout in documents.groups():
            blocks = layout.blocks[documents.rank]
            n_open = [_open_tokens(layout, block) for block in blocks]
            resets = None
            if n_open != [len(block) for block in blocks]:
                resets = starts[rows].clone()
                # A row's first document sees the row's initial state.
                resets[:, :1] &= blocks[0].start > 0
            if blocks[0].start == 0 and not has_initial_state:
                n_open[0] = KNOWN
            numbers = {
                block.start: (rank, number)
                for rank, of_rank in enumerate(layout.blocks)
                for number, block in enumerate(of_rank)
            }
            chain = [numbers[start] for start in sorted(numbers)]
            self.groups.append(Blocks(rows, [len(b) for b in blocks], n_open, resets, chain))
        self.slots = max(len(blocks) for row in documents.layouts for blocks in row.blocks)


def _open_tokens(layout: RowLayout, block: range) -> int:
    """How many of a block's tokens are of a document that began before it, or with the row."""
    document, part = next(layout.parts_of_block(block))
    return len(part) if document.start < block.start or block.start == 0 else 0


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
        inputs = (q, k, v, g, beta)
        out, final, M, *saved = keep_as_one(partial(_scan, inputs, initial_state, plan, comm))
        ctx.save_for_backward(*inputs, initial_state, M, *saved)
        ctx.plan, ctx.comm = plan, comm
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, initial_state, M, *saved = ctx.saved_tensors
        plan, comm, scale = ctx.plan, ctx.comm, q.shape[-1] ** -0.5
        borders, reads = saved[: len(plan.groups)], saved[len(plan.groups) :]
        d_final = d_final.to(M.dtype)
        told = _Told(plan, d_final, v.shape[-1])
        for number, (blocks, read) in enumerate(zip(plan.groups, reads, strict=True)):
            for slot, L in enumerate(_gradients_of_incoming(blocks, read, d_out[blocks.rows])):
                told.tensor[number, slot] = L
        of_ranks = told.gather(comm)

        gradients, d_initials = [], []
        for number, (rows, sizes, _, resets, chain) in enumerate(plan.groups):
            dS, leaving = d_final[rows], []
            for rank, block in reversed(chain):
                if rank == comm.rank:
                    leaving.append(dS)
                dS = of_ranks[rank, number, block] + M[rank, number, block].mT @ dS
            d_states = torch.stack(leaving[::-1])
            inputs = (x[rows] for x in (q, k, v, g, beta))
            *of_rows, _ = scan_backward(
                d_out[rows], d_states, *inputs, borders[number], resets, sizes, scale, CHUNK_TOKENS
            )
            gradients.append(of_rows)
            d_initials.append(dS)
        d_initial = _joined(d_initials).to(initial_state.dtype)
        return *map(_joined, zip(*gradients, strict=True)), d_initial, None, None


def _scan(
    inputs: tuple[Tensor, ...], initial_state: Tensor, plan: StatePlan, comm: Communicator
) -> tuple[Tensor, ...]:
    """The output, the final state, M of all blocks, and for each group of rows the states at its
    segments' borders, then what its tokens read of incoming states.
    """
    v = inputs[2]
    (D, E), scale = initial_state.shape[-2:], inputs[0].shape[-1] ** -0.5
    initial = initial_state.to(compute_dtype(v))
    told = _Told(plan, initial, E + D)
    scanned = []
    for number, (rows, sizes, n_open, resets, _) in enumerate(plan.groups):
        of_inputs = (x[rows] for x in (*inputs, initial))
        of_rows = Scan(*scan(*of_inputs, resets, sizes, n_open, scale, CHUNK_TOKENS))
        told.tensor[number, : len(sizes), ..., :E] = of_rows.states
        told.tensor[number, : len(sizes), ..., E:] = of_rows.transfers
        scanned.append(of_rows)
    B, M = told.gather(comm).split([E, D], dim=-1)

    finals = []
    for number, (blocks, of_rows) in enumerate(zip(plan.groups, scanned, strict=True)):
        S, incoming = initial[blocks.rows], []
        for rank, block in blocks.chain:
            if rank == comm.rank:
                incoming.append(S)
            S = B[rank, number, block] + M[rank, number, block] @ S
        close(of_rows, incoming, blocks.sizes, blocks.open_tokens)
        finals.append(S)
    out = _joined([of_rows.out for of_rows in scanned]).to(v.dtype)
    borders = [of_rows.borders for of_rows in scanned]
    reads = [of_rows.read for of_rows in scanned]
    return out, _joined(finals), M.contiguous(), *borders, *reads


def _gradients_of_incoming(blocks: Blocks, read: Tensor, d_out: Tensor) -> Iterator[Tensor]:
    """L of each block: of the state that comes into it, by what its tokens read of that."""
    place = n_read = 0
    for size, n_open in zip(blocks.sizes, blocks.open_tokens, strict=True):
        n = max(n_open, 0)
        of_block = read[:, :, n_read : n_read + n]
        yield of_block.mT @ d_out[:, :, place : place + n].to(read.dtype)
        place, n_read = place + size, n_read + n


class _Told:
    """What a rank tells the others: a matrix [D, width] for each block, row and head.

    Attributes:
        tensor: [groups of rows, blocks, rows, H, D, width], zero at first.
    """

    def __init__(self, plan: StatePlan, states: Tensor, width: int) -> None:
        n_groups = len(plan.groups)
        rows, heads, keys = states.shape[:3]
        self.tensor = states.new_zeros(n_groups, plan.slots, rows // n_groups, heads, keys, width)

    def gather(self, comm: Communicator) -> Tensor:
        """[ranks, ...] of all ranks."""
        return comm.start_all_gather(self.tensor[None], 0).wait()


def _joined(of_groups: Sequence[Tensor]) -> Tensor:
    return of_groups[0] if len(of_groups) == 1 else torch.cat(list(of_groups))
