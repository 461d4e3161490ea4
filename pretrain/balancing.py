"""What keeps the experts' loads even, from one optimizer step to the next."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.model.config import MoEConfig


class RouterState:
    """Expert frequencies and selection biases of all layers; they follow the global batches.

    It lives on the CPU, equal on all ranks. A `MoE` layer reads its own row in its buffers.

    Attributes:
        frequencies: [L, E] fp32, each expert's share of its layer's slots in the previous step.
        selection_bias: [L, E] fp32, zero unless `moe.balance` is "bias".
    """

    def __init__(self, n_layers: int, moe: MoEConfig) -> None:
        shape = (n_layers if moe.n_experts else 0, moe.n_experts)
        self.frequencies, self.selection_bias = torch.empty(shape), torch.empty(shape)
        self.bias_rate = moe.bias_rate if moe.balance == "bias" else 0.0
        self.reset()

    def reset(self) -> None:
        """As before the first step: all experts alike."""
        self.frequencies.fill_(1 / max(self.frequencies.shape[1], 1))
        self.selection_bias.zero_()

    def update(self, counts: Tensor) -> None:
        """Learn from the slots that each expert got in the whole global batch of a step.

        The bias of an expert moves by `bias_rate` towards the mean load (Wang et al. 2024,
        arXiv:2408.15664, algorithm 1).

        Args:
            counts: [L, E], whole numbers of any dtype.
        """
        counts = counts.cpu().double()
        total = counts.sum(-1, keepdim=True)
        self.frequencies.copy_(counts / total.clamp_min(1))
        self.selection_bias += self.bias_rate * torch.sign(total - counts * counts.shape[1])

    def copy_to(self, layers: Mapping[str, Any]) -> None:
        """Fill the buffers of layers that are keyed by their number in the whole model."""
        for number, layer in layers.items():
            if layer.moe is not None:
                layer.moe.frequencies.copy_(self.frequencies[int(number)])
                layer.moe.selection_bias.copy_(self.selection_bias[int(number)])

    @staticmethod
    def selection_bias_of(layers: Mapping[str, Any]) -> Tensor | None:
        """What `copy_to` put there: [L, E]; None for dense layers."""
        biases = [layer.moe.selection_bias for layer in layers.values() if layer.moe is not None]
        return torch.stack(biases) if biases else None

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves: loading into them in place restores this state."""
        return {"frequencies": self.frequencies, "selection_bias": self.selection_bias}


def auxiliary_loss(
    balance: Tensor, z: Tensor, tokens: int, n_layers: int, moe: MoEConfig
) -> Tensor:
    """What the routers add to the loss: the means over tokens and layers, by their weights.

    The parts of a global batch, and of a model's layers, add up to the whole. A selection bias
    takes the place of the balance loss.

    Args:
        balance: [L], see `Routing`; of any number of the model's layers.
        z: [L], see `Routing`.
        tokens: in the whole global batch.
        n_layers: layers with experts in the whole model.
    """
    aux_loss = 0.0 if moe.balance == "bias" else moe.aux_loss
    weighted = aux_loss * balance.sum() + moe.z_loss * z.sum()
    return weighted / (tokens * max(n_layers, 1))
