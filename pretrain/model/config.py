"""The model's settings: plain dataclasses, so that models and kernels run with torch alone.

The default family is what transformers calls Qwen3-Next: gated delta net and gated softmax
attention, 3 to 1, with a Mixture-of-Experts feed-forward. With every layer `softmax` or `sliding`,
no output gate and no shared expert it is Qwen3 (dense) or Qwen3-MoE.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

LayerKind = Literal["linear", "softmax", "sliding"]
Positions = Literal["rope", "none"]
Balance = Literal["batch", "sequence", "bias"]


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): RoPE for `factor` times the original length.

    Attributes:
        factor: 1 is RoPE as it is.
        original_length: in tokens, of the training before.
        beta_fast, beta_slow: pairs of dimensions that turn more often than the first within the
            original length are left alone; those that turn less often than the second are slowed
            down by `factor`.
        attention_factor: what rotated queries and keys are multiplied by; None is
            0.1 ln(factor) + 1 (equation 22).
        whole_pairs: whether the ramp between the two begins and ends at whole pairs.
    """

    factor: float = 1.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    whole_pairs: bool = True

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def scale_of_rotated(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention: grouped-query, with QK norm, partial RoPE and an output gate.

    Attributes:
        positions: of the first layers with softmax attention, `softmax` and `sliding`, repeated
            over the others: `rope` rotates queries and keys, `none` leaves them (NoPE, Kazemnejad
            et al. 2023, arXiv:2305.19466).
        window: how many tokens a query of a `sliding` layer sees, its own included.
    """

    n_heads: int = 16
    n_kv_heads: int = 2
    head_dim: int = 256
    output_gate: bool = True
    rope_base: float = 10_000_000.0
    rope_fraction: float = 0.25
    yarn: YarnConfig = field(default_factory=YarnConfig)
    positions: tuple[Positions, ...] = ("rope",)
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

    def rotates(self) -> tuple[bool, ...]:
        """Of each layer, whether it rotates queries and keys; layers of `linear` have none."""
        pattern, places = self.attention.positions, itertools.count()
        return tuple(
            kind != "linear" and pattern[next(places) % len(pattern)] == "rope"
            for kind in self.layer_kinds()
        )

    def window(self, kind: LayerKind) -> int | None:
        """How many tokens a query of a layer with softmax attention sees; None is all."""
        return self.attention.window if kind == "sliding" else None
