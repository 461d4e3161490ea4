"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.model.norm import upcast


@dataclass(frozen=True)
class Rotation:
    """The rotation of each token's queries and keys; cos and sin are [B, 1, T, R / 2] in fp32.

    Not a tuple: FSDP would cast the tensors of one to bf16, too coarse for far positions.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of_positions(cls, position: Tensor, rotary_dim: int, base: float) -> "Rotation":
        """For positions [B, T]: pair i of `rotary_dim / 2` turns by position * base^(-2i / R).

        The angles are fp32 because inference engines compute them so.
        """
        exponent = torch.arange(0, rotary_dim, 2, device=position.device).float() / rotary_dim
        angle = position[:, None, :, None].float() * (1 / base**exponent)
        return cls(angle.cos(), angle.sin())

    def __call__(self, x_bhtd: Tensor) -> Tensor:
        """Rotate the first R of D dimensions, pairing dimension i with i + R / 2."""
        half = self.cos.shape[-1]
        first, second, rest = x_bhtd.split([half, half, x_bhtd.shape[-1] - 2 * half], dim=-1)
        first, second = upcast(first), upcast(second)
        rotated = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return torch.cat([*(part.to(rest.dtype) for part in rotated), rest], dim=-1)
