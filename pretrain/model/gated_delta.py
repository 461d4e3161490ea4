"""Gated delta net: linear attention with a decaying, error-correcting state."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.config import ModelConfig
from pretrain.model.kernels.documents import Documents
from pretrain.model.kernels.gated_delta import gated_delta_rule
from pretrain.model.kernels.short_convolution import short_convolution
from pretrain.model.norm import RMSNorm, l2_norm, upcast


class GatedDeltaNet(nn.Module):
    """S_t = e^{g_t} S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t / sqrt(D).

    Yang et al. 2024, arXiv:2412.06464, eq. 10; the decay g = -A softplus(a + dt_bias) is
    Mamba-2's (Dao & Gu 2024, arXiv:2405.21060). Each key head serves n_value_heads / n_key_heads
    consecutive value heads.

    Attributes:
        convolve: `(x [B, T, C], weight [C, W], documents) -> [B, T, C]`, a causal convolution of
            each channel within each document, and SiLU.
        scan: `(q, k, v, g, beta, *, documents) -> (out, final_state)`, q and k [B, H_k, T, D],
            v and out [B, H_v, T, E], g and beta [B, H_v, T].
            Context parallelism replaces both.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.linear
        self.key_dim, self.value_dim = c.key_dim, c.value_dim
        d_key, d_value = c.n_key_heads * c.key_dim, c.n_value_heads * c.value_dim
        self.q_proj = nn.Linear(config.d_model, d_key, bias=False)
        self.k_proj = nn.Linear(config.d_model, d_key, bias=False)
        self.v_proj = nn.Linear(config.d_model, d_value, bias=False)
        self.z_proj = nn.Linear(config.d_model, d_value, bias=False)
        self.b_proj = nn.Linear(config.d_model, c.n_value_heads, bias=False)
        self.a_proj = nn.Linear(config.d_model, c.n_value_heads, bias=False)
        self.q_conv = nn.Parameter(torch.empty(d_key, c.conv_width))
        self.k_conv = nn.Parameter(torch.empty(d_key, c.conv_width))
        self.v_conv = nn.Parameter(torch.empty(d_value, c.conv_width))
        self.A_log = nn.Parameter(torch.empty(c.n_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.n_value_heads))
        self.norm = RMSNorm(c.value_dim, config.norm_eps, zero_centered=False)
        self.o_proj = nn.Linear(d_value, config.d_model, bias=False)
        self.convolve = short_convolution
        self.scan = gated_delta_rule

    def forward(self, x_btd: Tensor, documents: Documents) -> Tensor:
        q_bthd, k_bthd, v_bthe = self._mixed_qkv(x_btd, documents)
        beta_bth = upcast(self.b_proj(x_btd)).sigmoid()
        step = F.softplus(upcast(self.a_proj(x_btd)) + upcast(self.dt_bias))
        g_bth = -upcast(self.A_log).exp() * step
        inputs = (l2_norm(q_bthd), l2_norm(k_bthd), v_bthe, g_bth, beta_bth)
        out_bhte, _ = self.scan(*(x.transpose(1, 2) for x in inputs), documents=documents)
        z_bthe = self.z_proj(x_btd).unflatten(-1, (-1, self.value_dim))
        return self.o_proj(self.norm(out_bhte.transpose(1, 2), gate=z_bthe).flatten(2))

    def _mixed_qkv(self, x_btd: Tensor, documents: Documents) -> tuple[Tensor, Tensor, Tensor]:
        """Project and convolve q, k and v as one tensor, so that a halo is exchanged once."""
        projections = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        convolutions = (self.q_conv, self.k_conv, self.v_conv)
        qkv = F.linear(x_btd, torch.cat(projections))
        mixed = self.convolve(qkv, torch.cat(convolutions), documents)
        q, k, v = mixed.split([len(weight) for weight in convolutions], dim=-1)
        q_bthd, k_bthd = (x.unflatten(-1, (-1, self.key_dim)) for x in (q, k))
        return q_bthd, k_bthd, v.unflatten(-1, (-1, self.value_dim))
