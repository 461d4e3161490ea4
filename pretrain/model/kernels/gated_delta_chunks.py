"""The mathematics of one segment of the gated delta rule in its chunked WY form, and its reverse.

Notation of Yang et al. 2024 (arXiv:2412.06464, section 3.3), for the recurrence
    S_t = exp(g_t) S_{t-1} + beta_t k_t^T (v_t - exp(g_t) k_t S_{t-1}),    o_t = q_t S_t,
with row vectors q_t, k_t [D], v_t [E] and the state S [D, E]. In a chunk of C tokens, with the
decays gamma_i (from the chunk's start to token i), Gamma_ij (from token j to token i) and
gamma_C / gamma_j (from token j to the chunk's end):
    A = strictly lower part of (beta k) k^T * Gamma,    T = (I + A)^-1
    U = T (beta v),    W = T (beta gamma k),    P = q k^T * Gamma
    V' = U - W S,    O = (gamma q) S + P V',    S_out = gamma_C S + ((gamma_C / gamma) k)^T V'

A segment is N chunks of G = batch * value heads sequences. All tensors of a segment are chunk-major
and flat, [N * G, C, ...], so that batched products need no copies and a chunk is one slice.
Document boundaries are exact zeros in the decays; everything else follows.
"""

# ruff: noqa: N803 (the names of the paper)
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Boundaries(NamedTuple):
    """Where documents start, as factors of 0 and 1: two tokens are of one document
    [N*G, C, C]; a token is of the document that enters its chunk, of the one that leaves it
    [N*G, C, 1].
    """

    same_document: Tensor
    entering: Tensor
    leaving: Tensor


class Segment(NamedTuple):
    """The inputs: q (scaled) and k [N*G, C, D], v [N*G, C, E], g and beta [N*G, C, 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    boundaries: Boundaries | None


class Decays(NamedTuple):
    """Gamma [N*G, C, C], gamma and gamma_C / gamma [N*G, C, 1], gamma_C [N*G, 1, 1]."""

    within: Tensor
    from_start: Tensor
    to_end: Tensor
    chunk: Tensor


class Prepared(NamedTuple):
    """What the chunks compute without the state; k_to_end is (gamma_C / gamma) k.

    A is valid below its diagonal.
    """

    decays: Decays
    A: Tensor
    T: Tensor
    U: Tensor
    W: Tensor
    P: Tensor
    k_to_end: Tensor


class Gradients(NamedTuple):
    """The gradients of a segment's inputs, in their shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def document_boundaries(resets: Tensor, dtype: torch.dtype) -> Boundaries | None:
    """From resets [N*G, C] bool: from this token on, nothing earlier is seen."""
    # A GPU is not asked: the host would wait for it.
    if resets.device.type == "cpu" and not resets.any():
        return None
    document = resets.cumsum(-1)
    return Boundaries(
        (document.unsqueeze(-1) == document.unsqueeze(-2)).to(dtype),
        (document == 0).unsqueeze(-1).to(dtype),
        (document == document[:, -1:]).unsqueeze(-1).to(dtype),
    )


def chunk_decays(g: Tensor, boundaries: Boundaries | None) -> Decays:
    """From g [N*G, C, 1]; exactly 0 between documents and where less than `negligible`."""
    # Powers of 2, because CPU exp is 10 to 100 times slower where its result underflows.
    log2_gamma = g.cumsum(-2).mul_(1 / math.log(2))
    # Above the diagonal exp2 may overflow: tril_ writes zeros there, it does not multiply.
    within = (log2_gamma - log2_gamma.mT).exp2_().tril_()
    from_start = log2_gamma.exp2()
    to_end = (log2_gamma[:, -1:] - log2_gamma).exp2_()
    if boundaries is not None:
        within.mul_(boundaries.same_document)
        from_start.mul_(boundaries.entering)
        to_end.mul_(boundaries.leaving)
    for decay in (within, from_start, to_end):
        F.threshold(decay, negligible(g.dtype), 0.0, inplace=True)
    return Decays(within, from_start, to_end, from_start[:, -1:])


def prepare(segment: Segment) -> Prepared:
    """The UT transform and the decays of every chunk."""
    q, k, v, g, beta, boundaries = segment
    decays = chunk_decays(g, boundaries)
    k_beta = k * beta
    A = torch.bmm(k_beta, k.mT).mul_(decays.within)
    T = unit_lower_inverse(A)
    U = torch.bmm(T, v * beta)
    W = torch.bmm(T, k_beta.mul_(decays.from_start))
    P = torch.bmm(q, k.mT).mul_(decays.within)
    return Prepared(decays, A, T, U, W, P, k * decays.to_end)


def unit_lower_inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 for the strictly lower part of A [..., C, C]; the rest of A is not read."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
    inverse = torch.linalg.solve_triangular(A, identity, upper=False, unitriangular=True)
    return F.hardshrink(inverse, negligible(A.dtype))


def negligible(dtype: torch.dtype) -> float:
    """What rounding loses beside 1. Decays this small are zeros here, because a strong gate would
    fill the chunk with denormal numbers, on which CPUs are 5 times slower.
    """
    return torch.finfo(dtype).eps ** 2


def scan_states(p: Prepared, U: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The states [N + 1, G, D, E] between the chunks, from S [G, D, E], and V' [N*G, C, E].

    The map from S to the last state is affine, S -> M S + B. With U extended by D zero columns and
    S = [0 | I] the last state is [B | M].
    """
    U, W, k_to_end, decay = _chunks(S.shape[0], U, p.W, p.k_to_end, p.decays.chunk)
    states = S.new_empty(len(U) + 1, *S.shape)
    V_new = torch.empty_like(U)
    states[0] = S
    for U_n, W_n, k_n, decay_n, S_in, S_out, V_n in zip(
        U, W, k_to_end, decay, states[:-1], states[1:], V_new, strict=True
    ):
        torch.baddbmm(U_n, W_n, S_in, alpha=-1, out=V_n)
        torch.mul(S_in, decay_n, out=S_out).baddbmm_(k_n.mT, V_n)
    return states, V_new.flatten(0, 1)


def outputs(segment: Segment, p: Prepared, states: Tensor, V_new: Tensor) -> Tensor:
    """O [N*G, C, E]."""
    from_state = torch.bmm(segment.q, states[:-1].flatten(0, 1)).mul_(p.decays.from_start)
    return from_state.baddbmm_(p.P, V_new)


def scan_state_gradients(
    segment: Segment, p: Prepared, dO: Tensor, dS: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients [N + 1, G, D, E] of the states, from dS [G, D, E] of the last, and of V'.

    The map from dS to the first state's gradient is affine, dS -> M^T dS + L: from dS = 0 the
    first gradient is L.
    """
    d_states = dS.new_empty(len(dO) // len(dS) + 1, *dS.shape)
    d_states[-1] = dS
    torch.bmm(segment.q.mT, dO * p.decays.from_start, out=d_states[:-1].flatten(0, 1))
    dV_new = torch.bmm(p.P.mT, dO)
    dV, W, k_to_end, decay = _chunks(len(dS), dV_new, p.W, p.k_to_end, p.decays.chunk)
    for n in reversed(range(len(dV))):
        dV[n].baddbmm_(k_to_end[n], d_states[n + 1])
        d_states[n].addcmul_(decay[n], d_states[n + 1]).baddbmm_(W[n].mT, dV[n], alpha=-1)
    return d_states, dV_new


def segment_gradients(
    segment: Segment,
    p: Prepared,
    states: Tensor,
    V_new: Tensor,
    dO: Tensor,
    d_states: Tensor,
    dV_new: Tensor,
) -> Gradients:
    """From the gradients of the outputs and what `scan_state_gradients` made of them.

    V' is the error of a prediction that k reads, V' = beta (v - gamma k S - (k k^T * Gamma) V')
    (strictly lower part), so what k reads there gets its gradient with the factor -beta.
    """
    q, k, v, _, beta, _ = segment
    within, from_start, to_end, chunk = p.decays
    S_in, dS_out = states[:-1].flatten(0, 1), d_states[1:].flatten(0, 1)

    dP = torch.bmm(dO, V_new.mT)
    d_log_within = dP * p.P
    dP.mul_(within)
    dq = torch.bmm(dO, S_in.mT).mul_(from_start)
    d_log_from_start = _dot(q, dq)
    dq.baddbmm_(dP, k)

    d_error = torch.bmm(p.T.mT, dV_new)
    d_kk = torch.bmm(d_error, V_new.mT)
    d_log_within.addcmul_(d_kk, p.A, value=-1)
    d_kk.mul_(within).diagonal(dim1=-2, dim2=-1).zero_()
    dk_read = torch.bmm(d_error, S_in.mT).mul_(from_start)
    d_log_from_start.addcmul_(beta, _dot(k, dk_read), value=-1)
    dk_read.baddbmm_(d_kk, k)

    dk_written = torch.bmm(V_new, dS_out.mT).mul_(to_end)
    d_log_to_end = _dot(k, dk_written)
    dk_written.baddbmm_(d_kk.mT, k * beta, alpha=-1).baddbmm_(dP.mT, q)
    d_log_chunk = (dS_out * S_in).sum((-2, -1), keepdim=True).mul_(chunk)

    dg = _gradient_of_g(d_log_within, d_log_from_start, d_log_to_end, d_log_chunk)
    dbeta = _dot(v, d_error).sub_(_dot(k, dk_read))
    dk = dk_written.addcmul_(dk_read, beta, value=-1)
    return Gradients(dq, dk, d_error.mul_(beta), dg, dbeta)


def _gradient_of_g(within: Tensor, from_start: Tensor, to_end: Tensor, chunk: Tensor) -> Tensor:
    """From the gradients of the logarithms of `Decays`; what is not below a diagonal is not read.

    g_t is in the decays between tokens j < t <= i, from the start to i >= t, and from j < t to the
    end. What they add is summed up as it is: the difference of the sums over rows and columns,
    shorter to write, would leave ten times the rounding in a sum over tokens.
    """
    dg = from_start.flip(-2).cumsum(-2).flip(-2).add_(chunk)
    dg[:, 1:] += to_end.cumsum(-2)[:, :-1]
    dg[:, 1:, 0] += within.cumsum_(-1).tril_(-1).sum(-2)[:, :-1]
    return dg


def _chunks(G: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each [N * G, ...] as [N, G, ...]."""
    return tuple(x.unflatten(0, (-1, G)) for x in tensors)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
