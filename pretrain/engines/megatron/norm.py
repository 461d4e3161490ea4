"""RMSNorm for megatron-core without Transformer Engine and Apex."""

from typing import Any

from megatron.core.transformer import TransformerConfig
from torch import nn

from pretrain.model.norm import RMSNorm


class Norm(RMSNorm):
    """farspan's norm; megatron-core's wrapper of torch's refuses sequence parallelism, where the
    gradient is a part that `finalize_model_grads` sums if it is told so, and zero-centred weights.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps, config.layernorm_zero_centered_gamma)
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel
