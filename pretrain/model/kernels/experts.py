"""The feed-forwards of all experts at once: each token through its experts, summed by weight."""

from torch import Tensor

from pretrain.model.kernels.experts_grouped import grouped_mixture
from pretrain.model.kernels.experts_loop import looped_mixture
from pretrain.model.kernels.slots import Slots


def swiglu_mixture(
    x: Tensor, expert_weights: Tensor, slots: Slots, gate_up: Tensor, down: Tensor
) -> Tensor:
    """sum_k w_k down_e(silu(gate_e(x)) * up_e(x)) over the experts e that each token chose.

    The order of the additions depends on nothing but `slots`.

    Args:
        x: [M, d]; M may be 0, and any expert may be without tokens.
        expert_weights: [M, k]
        slots: the tokens' choices.
        gate_up: [E, 2 * I, d], the gate projection's rows before the up projection's.
        down: [E, d, I]. On a GPU d and I are multiples of 16 bytes (8 in bf16).

    Returns:
        [M, d].
    """
    mixture = looped_mixture if x.device.type == "cpu" else grouped_mixture
    return mixture(x, expert_weights, slots, gate_up, down)
