"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464) with memory linear in the length.

Forward and backward go over the sequence in segments. Between them only the states at the
segments' borders are kept; the backward recomputes the rest, one segment at a time.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.gated_delta_chunks import Segment, document_boundaries
from pretrain.model.kernels.gated_delta_forms import form_on, segment_tokens

CHUNK_TOKENS = 64


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    documents: Documents | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    chunk_size: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Linear attention whose state forgets by exp(g) and is corrected by the delta rule.

    Args:
        q, k: [B, Hk, T, D]; each key head serves Hv / Hk consecutive value heads. Normalising them
            is the caller's business.
        v: [B, Hv, T, E].
        g: [B, Hv, T], log of the decay, <= 0.
        beta: [B, Hv, T], the writing strength, in [0, 1].
        documents: boundaries that no state passes; None means one document per row.
        initial_state: [B, Hv, D, E] for the first document of each row; zeros by default.
        scale: multiplies q; D ** -0.5 by default.
        chunk_size: tokens per chunk; T need not be a multiple of it.

    Returns:
        out [B, Hv, T, E] in v's dtype, and the last document's final state [B, Hv, D, E]. The
        state and all arithmetic are float32, or float64 for float64 inputs.
    """
    check_shapes(q, k, v, g, beta, initial_state, documents)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if initial_state is None:
        B, Hv, _, E = v.shape
        initial_state = v.new_zeros(B, Hv, q.shape[-1], E, dtype=compute_dtype(v))
    return _GatedDeltaRule.apply(
        q, k, v, g, beta, initial_state, _resets(documents), scale, chunk_size
    )


def gated_delta_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    documents: Documents | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `gated_delta_rule`, token by token: for decoding and as a reference."""
    check_shapes(q, k, v, g, beta, initial_state, documents)
    dtype = compute_dtype(v)
    q, k = (x.to(dtype).repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q, k))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    resets = _resets(documents)
    S = v.new_zeros(*v.shape[:2], q.shape[-1], v.shape[-1], dtype=dtype)
    if initial_state is not None:
        S = initial_state.to(dtype)
    out = []
    for t in range(v.shape[2]):
        if resets is not None:
            S = S.masked_fill(resets[:, t, None, None, None], 0)
        S = S * g[:, :, t, None, None].to(dtype).exp()
        k_t = k[:, :, t, None]
        S = S + k_t.mT @ ((v[:, :, t, None] - k_t @ S) * beta[:, :, t, None, None])
        out.append(q[:, :, t, None] @ S)
    return torch.cat(out, dim=2).to(v.dtype), S


@torch.library.custom_op("farspan::gated_delta_scan", mutates_args=())
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    resets: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the final state, and the states at the segments' borders.

    One operation to dispatch modes, so that activation recompute can keep its results.
    """
    form = form_on(v.device)
    state = initial_state.to(compute_dtype(v)).flatten(0, 1)
    out = torch.empty_like(v)
    borders = []
    for tokens in segments(v):
        borders.append(state)
        segment = load_segment(q, k, v, g, beta, resets, scale, chunk_size, tokens)
        prepared = form.prepare(segment)
        states, V_new = form.scan_states(prepared, prepared.U, state)
        _store(out, tokens, form.outputs(segment, prepared, states, V_new))
        state = states[-1].clone()
    return out, state.view(initial_state.shape), torch.stack(borders)


@scan.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.empty_like(initial_state, dtype=compute_dtype(v))
    borders = state.new_empty(-(-v.shape[2] // segment_tokens(v)), *state.flatten(0, 1).shape)
    return torch.empty_like(v), state, borders


class OpenScan(NamedTuple):
    """A scan over tokens whose incoming state S is not known yet: everything is affine in it.

    Attributes:
        out: [B, Hv, T, E], the output from S = 0, in the compute dtype.
        read: [B, Hv, n, D], what the n tokens that see S read of it: their output is out + read S.
        state: [B, Hv, D, E], the final state from S = 0.
        transfer: [B, Hv, D, D], the final state is state + transfer S.
        borders: states at the segments' borders, from S = 0, [segments, B * Hv, D, E].
        border_transfers: [segments that see S, B * Hv, D, D], like `transfer`.
    """

    out: Tensor
    read: Tensor
    state: Tensor
    transfer: Tensor
    borders: Tensor
    border_transfers: Tensor


def open_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    resets: Tensor | None,
    open_tokens: int,
    scale: float,
    chunk_size: int,
) -> OpenScan:
    """`scan` without the state that comes in; arguments as there.

    Args:
        open_tokens: the first so many tokens may see that state; later ones come after a reset.
    """
    return OpenScan(*_open_scan(q, k, v, g, beta, resets, open_tokens, scale, chunk_size))


def close_scan(opened: OpenScan, state: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the borders' states, once the incoming state [B, Hv, D, E] is there."""
    out, borders = opened.out.clone(), opened.borders.clone()
    n_tokens, n_borders = opened.read.shape[2], len(opened.border_transfers)
    out[:, :, :n_tokens] += opened.read @ state
    borders[:n_borders] += opened.border_transfers @ state.flatten(0, 1)
    return out, borders


@torch.library.custom_op("farspan::gated_delta_open_scan", mutates_args=())
def _open_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    resets: Tensor | None,
    open_tokens: int,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of an `OpenScan`. From the state [0 | I] the scan gives [state | transfer]."""
    form = form_on(v.device)
    (B, H, T, E), D, dtype = v.shape, q.shape[-1], compute_dtype(v)
    out = v.new_empty(v.shape, dtype=dtype)
    read = v.new_empty(B, H, open_tokens, D, dtype=dtype)
    identity = torch.eye(D, dtype=dtype, device=v.device).expand(B * H, D, D)
    state = torch.cat([identity.new_zeros(B * H, D, E), identity], dim=-1)
    borders, border_transfers = [], []
    for tokens in segments(v):
        is_open = tokens.start < open_tokens
        segment = load_segment(q, k, v, g, beta, resets, scale, chunk_size, tokens)
        prepared = form.prepare(segment)
        U = prepared.U
        if is_open:
            U = F.pad(U, (0, D))
            border_transfers.append(state[..., E:])
        else:
            state = state[..., :E]
        borders.append(state[..., :E])
        states, V_new = form.scan_states(prepared, U, state)
        both = form.outputs(segment, prepared, states, V_new)
        _store(out, tokens, both[..., :E])
        if is_open:
            _store(read, tokens, both[..., E:])
        state = states[-1]
    sees_no_reset = open_tokens == T
    transfer = state[..., E:] if sees_no_reset else torch.zeros_like(identity)
    return (
        out,
        read,
        state[..., :E].unflatten(0, (B, H)).clone(),
        transfer.unflatten(0, (B, H)).clone(),
        torch.stack(borders),
        torch.stack(border_transfers)
        if border_transfers
        else identity.new_empty(0, *identity.shape),
    )


@_open_scan.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    resets: Tensor | None,
    open_tokens: int,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, H, T, E), D, size = v.shape, q.shape[-1], segment_tokens(v)

    def empty(*shape: int) -> Tensor:
        return v.new_empty(shape, dtype=compute_dtype(v))

    return (
        empty(B, H, T, E),
        empty(B, H, open_tokens, D),
        empty(B, H, D, E),
        empty(B, H, D, D),
        empty(-(-T // size), B * H, D, E),
        empty(-(-open_tokens // size), B * H, D, D),
    )


@torch.library.custom_op("farspan::gated_delta_scan_backward", mutates_args=())
def scan_backward(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    borders: Tensor,
    resets: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g, beta and the initial state."""
    form = form_on(v.device)
    inputs = (q, k, v, g, beta)
    gradients = [torch.empty_like(x) for x in inputs]
    dS = d_state.to(borders.dtype).flatten(0, 1)
    for border, tokens in reversed(list(zip(borders, segments(v), strict=True))):
        segment = load_segment(*inputs, resets, scale, chunk_size, tokens)
        prepared = form.prepare(segment)
        states, V_new = form.scan_states(prepared, prepared.U, border)
        dO = to_chunks(d_out[:, :, tokens], chunk_size, borders.dtype)
        d_states, dV_new = form.scan_state_gradients(segment, prepared, dO, dS)
        chunk_gradients = form.segment_gradients(
            segment, prepared, states, V_new, dO, d_states, dV_new
        )
        chunk_gradients.q.mul_(scale)
        for gradient, chunks in zip(gradients, chunk_gradients, strict=True):
            _store(gradient, tokens, chunks)
        dS = d_states[0]
    dq, dk, dv, dg, dbeta = gradients
    return dq, dk, dv, dg, dbeta, dS.reshape(d_state.shape)


@scan_backward.register_fake
def _(d_out: Tensor, d_state: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *inputs, borders = others[:6]
    gradients = [torch.empty_like(x) for x in inputs]
    return *gradients, torch.empty_like(d_state, dtype=borders.dtype)


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        resets: Tensor | None,
        scale: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        out, state, borders = scan(q, k, v, g, beta, initial_state, resets, scale, chunk_size)
        ctx.save_for_backward(q, k, v, g, beta, initial_state, resets, borders)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, initial_state, resets, borders = ctx.saved_tensors
        gradients = scan_backward(
            d_out, d_state, q, k, v, g, beta, borders, resets, ctx.scale, ctx.chunk_size
        )
        return *gradients[:5], gradients[5].to(initial_state.dtype), None, None, None


def segments(v: Tensor) -> Iterator[slice]:
    """Slices of tokens that cover the sequence of v [B, Hv, T, E]."""
    size, length = segment_tokens(v), v.shape[2]
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


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


def _resets(documents: Documents | None) -> Tensor | None:
    """[B, T] bool: no earlier state is seen from here on. A row's first document sees its own."""
    if documents is None or not documents.is_packed:
        return None
    resets = documents.position == 0
    resets[:, 0] = False
    return resets


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    documents: Documents | None,
) -> None:
    B, Hv, T, E = v.shape
    Hk, D = q.shape[1], q.shape[-1]
    expected = [
        ("q", q, (B, Hk, T, D)),
        ("k", k, (B, Hk, T, D)),
        ("g", g, (B, Hv, T)),
        ("beta", beta, (B, Hv, T)),
    ]
    if initial_state is not None:
        expected.append(("initial_state", initial_state, (B, Hv, D, E)))
    if documents is not None:
        expected.append(("documents.position", documents.position, (B, T)))
    for name, x, shape in expected:
        if x.shape != shape:
            raise ValueError(
                f"gated_delta_rule: {name} has shape {tuple(x.shape)}, but {shape} belongs to "
                f"v {tuple(v.shape)} and q {tuple(q.shape)}"
            )
    if Hv % Hk:
        raise ValueError(f"gated_delta_rule: {Hv} value heads are not a multiple of {Hk} key heads")
