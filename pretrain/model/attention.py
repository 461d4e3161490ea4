"""Softmax attention."""

import torch
from torch import Tensor, nn

from pretrain.model.config import ModelConfig
from pretrain.model.kernels.attention import documents_attention
from pretrain.model.kernels.documents import Documents
from pretrain.model.norm import RMSNorm
from pretrain.model.rope import Rotation


class Attention(nn.Module):
    """Grouped-query attention with QK norm, partial RoPE and an optional sigmoid output gate.

    GQA: Ainslie et al. 2023, arXiv:2305.13245. Gate: Qiu et al. 2025, arXiv:2505.06708.

    Attributes:
        window: how many tokens a query sees, its own included; None is all.
        rotates: whether queries and keys are rotated by their positions.
        core: `(q, k, v, documents, *, scale, window) -> out`, q and out [B, H, T, D], k and v
            [B, H_kv, T, D]; causal within each document. Context parallelism replaces it.
    """

    def __init__(self, config: ModelConfig, window: int | None, rotates: bool = True) -> None:
        super().__init__()
        c = config.attention
        self.window = window
        self.rotates = rotates
        self.head_dim = c.head_dim
        d_query, d_key = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.q_proj = nn.Linear(config.d_model, d_query, bias=False)
        self.k_proj = nn.Linear(config.d_model, d_key, bias=False)
        self.v_proj = nn.Linear(config.d_model, d_key, bias=False)
        self.gate_proj = nn.Linear(config.d_model, d_query, bias=False) if c.output_gate else None
        self.o_proj = nn.Linear(d_query, config.d_model, bias=False)
        self.q_norm = RMSNorm(c.head_dim, config.norm_eps, config.zero_centered_norm)
        self.k_norm = RMSNorm(c.head_dim, config.norm_eps, config.zero_centered_norm)
        self.core = documents_attention

    def forward(self, x_btd: Tensor, documents: Documents, rotation: Rotation) -> Tensor:
        q_bhtd = self.q_norm(self._heads(self.q_proj(x_btd)))
        k_bhtd = self.k_norm(self._heads(self.k_proj(x_btd)))
        if self.rotates:
            q_bhtd, k_bhtd = rotation(q_bhtd), rotation(k_bhtd)
        v_bhtd = self._heads(self.v_proj(x_btd))
        out_bhtd = self.core(
            q_bhtd, k_bhtd, v_bhtd, documents, scale=self.head_dim**-0.5, window=self.window
        )
        out = out_bhtd.transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            out = out * torch.sigmoid(self.gate_proj(x_btd))
        return self.o_proj(out)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H * D] -> [B, H, T, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
