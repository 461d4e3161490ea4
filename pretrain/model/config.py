"""The model's settings: plain dataclasses, so that models and kernels run with torch alone.

The default family is what transformers calls Qwen3-Next: gated delta net and gated softmax
attention, 3 to 1, with a Mixture-of-Experts feed-forward. With every layer `softmax` or `sliding`,
no output gate and no shared expert it is Qwen3 (dense) or Qwen3-MoE.
"""

from dataclasses import dataclass, field
from typing import Literal

LayerKind = Literal["linear", "softmax", "sliding"]
Balance = Literal["batch", "sequence", "bias"]


@dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention: grouped-query, with QK norm, partial RoPE and an output gate.

    Attributes:
        window: how many tokens a query of a `sliding` layer sees, its own included.
    """

    n_heads: int = 16
    n_kv_heads: int = 2
    head_dim: int = 256
    output_gate: bool = True
    rope_base: float = 10_000_000.0
    rope_fraction: float = 0.25
    window: int = 4096

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Gated delta net (Yang et al. 2024, arXiv:2412.06464)."""

    n_key_heads: int = 16
    n_value_heads: int = 32
    key_dim: int = 128
    value_dim: int = 128
    conv_width: int = 4

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts; with `n_experts = 0` every feed-forward is a dense SwiGLU of `d_ff`.

    Attributes:
        aux_loss: weight of the balance loss.
        balance: what keeps the experts' loads even: the balance loss with the frequencies of the
            whole batch or of each sequence, or, without that loss, a selection bias that follows
            the loads.
        bias_rate: how far the selection bias moves in a step.
        z_loss: weight of the router's z-loss.
        capacity_factor: an expert takes at most this many times its even share of a sequence's
            slots in training, the rest is dropped; None drops nothing.
    """

    n_experts: int = 512
    top_k: int = 10
    d_expert: int = 512
    d_shared_expert: int = 512
    renormalise_top_k: bool = True
    aux_loss: float = 0.001
    balance: Balance = "batch"
    bias_rate: float = 0.001
    z_loss: float = 0.0
    capacity_factor: float | None = None

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012


@dataclass(frozen=True)
class ModelConfig:
    """All of a model.

    Attributes:
        layer_pattern: the kinds of the first layers, repeated over the others: `linear` is a gated
            delta net, `softmax` attends to the whole document, `sliding` to a window of it.
    """

    vocab_size: int = 151_936
    d_model: int = 2048
    n_layers: int = 48
    layer_pattern: tuple[LayerKind, ...] = ("linear", "linear", "linear", "softmax")
    d_ff: int = 5632
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    linear: LinearAttentionConfig = field(default_factory=LinearAttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    zero_centered_norm: bool = True
    init_std: float = 0.02

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer: the pattern, repeated over `n_layers`."""
        return tuple(self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.n_layers))

    def window(self, kind: LayerKind) -> int | None:
        """How many tokens a query of a layer with softmax attention sees; None is all."""
        return self.attention.window if kind == "sliding" else None
