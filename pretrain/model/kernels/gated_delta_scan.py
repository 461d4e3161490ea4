"""The gated delta rule over blocks of tokens, forward and backward, as operations on tensors.

Both go over a block in segments. Between them only the states at the segments' borders are kept;
the backward recomputes the rest, one segment at a time.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.model.kernels.gated_delta_chunks import Segment, document_boundaries, negligible
from pretrain.model.kernels.gated_delta_forms import form_on, segment_tokens

CHUNK_TOKENS = 64
# In place of a number of open tokens: the state that comes into the block is known.
KNOWN = -1


class Scan(NamedTuple):
    """What a scan over n blocks of tokens gives.

    A block is open while its incoming state S is not known: what it gives is affine in S, and
    stands here for S = 0.

    Attributes:
        out: [B, Hv, T, E], in v's dtype; where a block is open in the compute dtype.
        states: [n, B, Hv, D, E], the blocks' final states.
        borders: [segments, B * Hv, D, E], the states at the segments' borders.
        read: [B, Hv, open tokens, D], what they read of S: their output is out + read S.
        transfers: [n, B, Hv, D, D], a final state is state + transfer S; zero where S is known.
        border_transfers: [open segments, B * Hv, D, D], the same of borders.
    """

    out: Tensor
    states: Tensor
    borders: Tensor
    read: Tensor
    transfers: Tensor
    border_transfers: Tensor


@torch.library.custom_op("farspan::gated_delta_scan", mutates_args=())
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    sizes: Sequence[int],
    open_tokens: Sequence[int],
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of a `Scan`. Arguments not named here are those of `gated_delta_rule`.

    One operation to dispatch modes, so that activation recompute can keep its results.

    Args:
        resets: [B, T] bool, nothing earlier is seen from here on.
        sizes: tokens of the blocks, which lie one after the other.
        open_tokens: of each block, how many see an incoming state that is not known, or KNOWN
            where that state is `initial_state`.
    """
    form = form_on(v.device)
    (B, H, D, E), dtype = initial_state.shape, compute_dtype(v)
    out = torch.empty_like(v, dtype=v.dtype if set(open_tokens) == {KNOWN} else dtype)
    read = v.new_empty(B, H, _total(open_tokens), D, dtype=dtype)
    zero = v.new_zeros(B * H, D, E, dtype=dtype)
    identity = torch.eye(D, dtype=dtype, device=v.device).expand(B * H, D, D)
    nothing = torch.zeros_like(identity)
    states, transfers, borders, border_transfers = [], [], [], []
    for block, n_open, to_read in zip(
        _slices(sizes), open_tokens, _slices(open_tokens), strict=True
    ):
        state, transfer = zero, identity
        if n_open == KNOWN:
            state, transfer = initial_state.to(dtype).flatten(0, 1), nothing
        for tokens in segments(block, segment_tokens(v)):
            segment = load_segment(q, k, v, g, beta, resets, scale, chunk_size, tokens)
            prepared = form.prepare(segment)
            borders.append(state)
            inside = slice(tokens.start - block.start, tokens.stop - block.start)
            U, is_open = prepared.U, inside.start < n_open
            if is_open and _is_spent(transfer):
                border_transfers.append(nothing)
                read[:, :, to_read][:, :, inside] = 0
            elif is_open:
                # From [state | transfer], with zeros beside U, the scan gives both.
                border_transfers.append(transfer)
                U, state = F.pad(U, (0, D)), torch.cat([state, transfer], dim=-1)
            all_states, V_new = form.scan_states(prepared, U, state)
            both = form.outputs(segment, prepared, all_states, V_new)
            _store(out[:, :, block], inside, both[..., :E])
            state = all_states[-1, ..., :E].clone()
            if both.shape[-1] > E:
                _store(read[:, :, to_read], inside, both[..., E:])
                transfer = F.hardshrink(all_states[-1, ..., E:], negligible(dtype))
        is_reset = 0 <= n_open < block.stop - block.start
        states.append(state.unflatten(0, (B, H)))
        transfers.append((nothing if is_reset else transfer).unflatten(0, (B, H)))
    return (
        out,
        torch.stack(states),
        torch.stack(borders),
        read,
        torch.stack(transfers),
        torch.stack(border_transfers) if border_transfers else nothing.new_empty(0, B * H, D, D),
    )


@scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    sizes: Sequence[int],
    open_tokens: Sequence[int],
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, H, D, E), dtype, size = initial_state.shape, compute_dtype(v), segment_tokens(v)

    def empty(*shape: int) -> Tensor:
        return v.new_empty(shape, dtype=dtype)

    return (
        torch.empty_like(v, dtype=v.dtype if set(open_tokens) == {KNOWN} else dtype),
        empty(len(sizes), B, H, D, E),
        empty(_n_segments(sizes, size), B * H, D, E),
        empty(B, H, _total(open_tokens), D),
        empty(len(sizes), B, H, D, D),
        empty(_n_segments(open_tokens, size), B * H, D, D),
    )


def close(
    scanned: Scan, incoming: Sequence[Tensor], sizes: Sequence[int], open_tokens: Sequence[int]
) -> None:
    """Complete the output and the borders' states in place, once the incoming states are there.

    Args:
        incoming: [B, Hv, D, E] of each block; not looked at where it was known.
    """
    out, borders = scanned.out, scanned.borders
    size = segment_tokens(out)
    n_borders = n_transfers = 0
    for state, block, n_open, of_read in zip(
        incoming, _slices(sizes), open_tokens, _slices(open_tokens), strict=True
    ):
        seen = slice(block.start, block.start + max(n_open, 0))
        for row in range(len(state) if n_open > 0 else 0):
            out[row, :, seen].baddbmm_(scanned.read[row, :, of_read], state[row])
        n = _n_segments([n_open], size)
        of_borders = scanned.border_transfers[n_transfers : n_transfers + n]
        borders[n_borders : n_borders + n] += of_borders @ state.flatten(0, 1)
        n_borders += _n_segments([block.stop - block.start], size)
        n_transfers += n


@torch.library.custom_op("farspan::gated_delta_scan_backward", mutates_args=())
def scan_backward(
    d_out: Tensor,
    d_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    borders: Tensor,
    resets: Tensor | None,
    sizes: Sequence[int],
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g, beta and, [n, B, Hv, D, E], of the states that come into blocks.

    Args:
        d_states: [n, B, Hv, D, E], of the blocks' final states.
    """
    form = form_on(v.device)
    inputs = (q, k, v, g, beta)
    gradients = [torch.empty_like(x) for x in inputs]
    d_incoming = torch.empty_like(d_states, dtype=borders.dtype)
    number = len(borders)
    for n, block in reversed(list(enumerate(_slices(sizes)))):
        dS = d_states[n].to(borders.dtype).flatten(0, 1)
        for tokens in reversed(list(segments(block, segment_tokens(v)))):
            number -= 1
            segment = load_segment(*inputs, resets, scale, chunk_size, tokens)
            prepared = form.prepare(segment)
            states, V_new = form.scan_states(prepared, prepared.U, borders[number])
            dO = to_chunks(d_out[:, :, tokens], chunk_size, borders.dtype)
            d_all_states, dV_new = form.scan_state_gradients(segment, prepared, dO, dS)
            chunk_gradients = form.segment_gradients(
                segment, prepared, states, V_new, dO, d_all_states, dV_new
            )
            chunk_gradients.q.mul_(scale)
            for gradient, chunks in zip(gradients, chunk_gradients, strict=True):
                _store(gradient, tokens, chunks)
            dS = d_all_states[0]
        d_incoming[n] = dS.view(d_states.shape[1:])
    dq, dk, dv, dg, dbeta = gradients
    return dq, dk, dv, dg, dbeta, d_incoming


@scan_backward.register_fake
def _(d_out: Tensor, d_states: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *inputs, borders = others[:6]
    gradients = [torch.empty_like(x) for x in inputs]
    return *gradients, torch.empty_like(d_states, dtype=borders.dtype)


def segments(block: slice, size: int) -> Iterator[slice]:
    """Slices of at most `size` tokens that cover a block."""
    for start in range(block.start, block.stop, size):
        yield slice(start, min(start + size, block.stop))


def load_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    resets: Tensor | None,
    scale: float,
    chunk_size: int,
    tokens: slice,
) -> Segment:
    """The tokens' chunks, in the compute dtype, with q scaled and k, q repeated per value head."""
    dtype, heads = compute_dtype(v), v.shape[1]
    group = heads // k.shape[1]
    q_chunks, k_chunks = (to_chunks(x[:, :, tokens], chunk_size, dtype, group) for x in (q, k))
    v_chunks, g_chunks, beta_chunks = (
        to_chunks(x[:, :, tokens], chunk_size, dtype) for x in (v, g[..., None], beta[..., None])
    )

    boundaries = None
    if resets is not None:
        per_head = resets[:, None, tokens].expand(-1, heads, -1)
        boundaries = document_boundaries(to_chunks(per_head, chunk_size, torch.bool), dtype)
    return Segment(q_chunks.mul_(scale), k_chunks, v_chunks, g_chunks, beta_chunks, boundaries)


def to_chunks(x: Tensor, chunk_size: int, dtype: torch.dtype, repeat: int = 1) -> Tensor:
    """[B, H, T, ...] to chunk-major [N * B * H * repeat, C, ...], the end padded with zeros.

    Padding changes no state: its k, beta and g are zero and it starts no document.
    """
    padding = -x.shape[2] % chunk_size
    if padding:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, padding))
    x = x.unflatten(2, (-1, chunk_size)).movedim(2, 0).unsqueeze(3)
    chunks = x.new_empty(*x.shape[:3], repeat, *x.shape[4:], dtype=dtype)
    return chunks.copy_(x).flatten(0, 3)


def _store(out: Tensor, tokens: slice, chunks: Tensor) -> None:
    """Write chunks to out[:, :, tokens], as far as out goes, summed over the repeats of a head."""
    B, H = out.shape[:2]
    target, size = out[:, :, tokens], chunks.shape[1]
    n_chunks = -(-(tokens.stop - tokens.start) // size)
    chunks = chunks.view(n_chunks, B, H, -1, size, *out.shape[3:])
    chunks = chunks.squeeze(3) if chunks.shape[3] == 1 else chunks.sum(3)
    whole, rest = divmod(target.shape[2], size)
    in_chunks = target[:, :, : whole * size].unflatten(2, (whole, size))
    in_chunks.copy_(chunks[:whole].movedim(0, 2))
    if rest:
        target[:, :, -rest:] = chunks[whole, :, :, :rest]


def compute_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def _is_spent(transfer: Tensor) -> bool:
    """Whether nothing of an incoming state is left: beta and g have overwritten it.

    A GPU is not asked, because the host would wait for the answer.
    """
    return transfer.device.type == "cpu" and not transfer.any()


def _slices(sizes: Sequence[int]) -> list[slice]:
    """Where parts of these sizes lie one after the other; KNOWN has no tokens."""
    return [slice(*part) for part in pairwise(accumulate((max(n, 0) for n in sizes), initial=0))]


def _total(sizes: Sequence[int]) -> int:
    return sum(max(n, 0) for n in sizes)


def _n_segments(sizes: Sequence[int], size: int) -> int:
    return sum(-(-max(n, 0) // size) for n in sizes)
