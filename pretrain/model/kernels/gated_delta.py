"""The gated delta rule (Yang et al. 2024, arXiv:2412.06464) with memory linear in the length.

Forward and backward go over the sequence in segments. Between them only the states at the
segments' borders are kept; the backward recomputes the rest, one segment at a time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.kernels import gated_delta_fla
from pretrain.model.kernels.backends import Setting, choose_rule
from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.gated_delta_scan import (
    CHUNK_TOKENS,
    KNOWN,
    compute_dtype,
    scan,
    scan_backward,
)


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
    backend: str | None = None,
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
        backend: `torch` or `fla`; by default the one that `choose_rule` prefers.

    Returns:
        out [B, Hv, T, E] in v's dtype, and the last document's final state [B, Hv, D, E]. The
        state and all arithmetic are float32, or float64 for float64 inputs; with `fla` what is
        multiplied is rounded to v's dtype.
    """
    check_shapes(q, k, v, g, beta, initial_state, documents)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = backend or choose_rule(Setting.here(v.device, v.dtype, q.shape[-1]))
    if backend == "fla":
        return gated_delta_fla.rule(q, k, v, g, beta, documents, initial_state, scale)
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
        inputs, whole = (q, k, v, g, beta), [v.shape[2]]
        out, states, borders, *_ = scan(
            *inputs, initial_state, resets, whole, [KNOWN], scale, chunk_size
        )
        ctx.save_for_backward(*inputs, initial_state, resets, borders)
        ctx.scale, ctx.chunk_size = scale, chunk_size
        return out, states[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, initial_state, resets, borders = ctx.saved_tensors
        whole = [d_out.shape[2]]
        *gradients, d_initial = scan_backward(
            d_out, d_state[None], *inputs, borders, resets, whole, ctx.scale, ctx.chunk_size
        )
        return *gradients, d_initial[0].to(initial_state.dtype), None, None, None


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
