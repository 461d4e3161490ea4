"""The scans of `gated_delta_chunks` with a transfer matrix for each chunk: for GPUs.

The transfers of all chunks are batched products, and a step of the scan is a single product: a
scan of few, large operations, where that of the chunks has three small ones for each chunk.
"""

# ruff: noqa: N803 (the names of the paper)
import torch
from torch import Tensor

from pretrain.model.kernels.gated_delta_chunks import Prepared, Segment


def scan_states(p: Prepared, U: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """See `gated_delta_chunks.scan_states`; S_out = M S + k_to_end^T U for each chunk."""
    G = len(S)
    M = _transfers(p).unflatten(0, (-1, G))
    B = torch.bmm(p.k_to_end.mT, U).unflatten(0, (-1, G))
    states = S.new_empty(len(M) + 1, *S.shape)
    states[0] = S
    for M_n, B_n, S_in, S_out in zip(M, B, states[:-1], states[1:], strict=True):
        torch.baddbmm(B_n, M_n, S_in, out=S_out)
    return states, torch.baddbmm(U, p.W, states[:-1].flatten(0, 1), alpha=-1)


def scan_state_gradients(
    segment: Segment, p: Prepared, dO: Tensor, dS: Tensor
) -> tuple[Tensor, Tensor]:
    """See `gated_delta_chunks.scan_state_gradients`; dS_in = M^T dS_out + L for each chunk."""
    G = len(dS)
    M = _transfers(p).unflatten(0, (-1, G))
    dV_new = torch.bmm(p.P.mT, dO)
    d_states = dS.new_empty(len(M) + 1, *dS.shape)
    d_states[-1] = dS
    L = d_states[:-1].flatten(0, 1)
    torch.bmm(segment.q.mT, dO * p.decays.from_start, out=L)
    L.baddbmm_(p.W.mT, dV_new, alpha=-1)
    for n in reversed(range(len(M))):
        d_states[n].baddbmm_(M[n].mT, d_states[n + 1])
    return d_states, dV_new.baddbmm_(p.k_to_end, d_states[1:].flatten(0, 1))


def _transfers(p: Prepared) -> Tensor:
    """M = gamma_C I - k_to_end^T W of each chunk, [N*G, D, D]."""
    M = torch.bmm(p.k_to_end.mT, p.W).neg_()
    M.diagonal(dim1=-2, dim2=-1).add_(p.decays.chunk.squeeze(-1))
    return M
