"""The affine maps by which context parallelism summarises a block of tokens."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.model.kernels.gated_delta import gated_delta_recurrent
from pretrain.model.kernels.gated_delta_chunks import prepare
from pretrain.model.kernels.gated_delta_forms import BY_CHUNK, BY_TRANSFER
from pretrain.model.kernels.gated_delta_scan import load_segment, to_chunks

B, H, LENGTH, D, E = 1, 2, 200, 8, 12


@pytest.mark.parametrize("form", [BY_CHUNK, BY_TRANSFER], ids=["by chunk", "by transfer"])
def test_a_block_maps_its_state_affinely(form):
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(B, H, LENGTH, D).double(), dim=-1) for _ in range(2))
    v = torch.randn(B, H, LENGTH, E).double()
    g, beta = -torch.rand(B, H, LENGTH).double(), torch.rand(B, H, LENGTH).double()
    S = torch.randn(B, H, D, E).double().requires_grad_()
    d_out, dS = torch.randn(B, H, LENGTH, E).double(), torch.randn(B, H, D, E).double()

    segment = load_segment(q, k, v, g, beta, None, D**-0.5, 64, slice(0, LENGTH))
    prepared = prepare(segment)
    zeros, identity = torch.zeros(H, D, E).double(), torch.eye(D).double().expand(H, D, D)
    U, S_and_I = F.pad(prepared.U, (0, D)), torch.cat([zeros, identity], -1)
    states, _ = form.scan_states(prepared, U, S_and_I)
    state_B, state_M = states[-1].split([E, D], -1)
    dO = to_chunks(d_out, 64, torch.float64)
    L = form.scan_state_gradients(segment, prepared, dO, zeros)[0][0]

    out, last = gated_delta_recurrent(q, k, v, g, beta, initial_state=S)
    (d_initial,) = torch.autograd.grad((out, last), S, (d_out, dS))
    torch.testing.assert_close(state_M @ S[0] + state_B, last[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state_M.mT @ dS[0] + L, d_initial[0], rtol=0, atol=1e-12)
